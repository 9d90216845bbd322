"""Everything that knows Ray: capture actors with their driver, and jobs on a cluster."""

from __future__ import annotations

# See tools/ownership.py.
OWNER = "logitstore"
