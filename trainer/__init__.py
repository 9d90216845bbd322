"""The application that trains one student from one or more stores, on one process or many."""

from __future__ import annotations

# See tools/ownership.py.
OWNER = "logitstore"
