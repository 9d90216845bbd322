"""Tables in Markdown, as they stand in BENCHMARKS.md."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from tools.benchmark.machine import describe_machine


def print_heading(command: str, *packages: str) -> None:
    """Print what every table needs above it: command, project version, date and machine."""
    from logitstore import __version__

    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    print(f"`{command}`, logitstore {__version__}, {today}; {describe_machine(*packages)}\n", flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table; columns after the first are aligned to the right."""
    lines = [list(header), ["---", *(["---:"] * (len(header) - 1))], *[[str(cell) for cell in row] for row in rows]]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n", flush=True)
