"""`python -m tools.benchmark`."""

from __future__ import annotations

from tools.cli import main

main("benchmark")
