"""The command line: one console script, `logitstore`, with a module for each of its verbs."""

from __future__ import annotations

# See tools/ownership.py.
OWNER = "logitstore"
