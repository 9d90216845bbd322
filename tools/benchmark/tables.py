"""What a benchmark prints: Markdown as it stands in BENCHMARKS.md, or the same as one JSON document."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from tools.benchmark.machine import describe_machine

_LOG = logging.getLogger(__name__)


@dataclass
class Page:
    """What one benchmark has said so far.

    Attributes:
        heading: `command`, `version`, `date` and `machine`.
        parts: tables (`header`, and `rows` with a cell for each name in it), with remarks (`text`) between them.
    """

    heading: dict[str, str] = field(default_factory=dict)
    parts: list[dict[str, object]] = field(default_factory=list)


_PAGE: ContextVar[Page | None] = ContextVar("page", default=None)


@contextmanager
def collect_page() -> Iterator[Page]:
    """While the block runs, what a benchmark says is put on the page and not printed."""
    page = Page()
    token = _PAGE.set(page)
    try:
        yield page
    finally:
        _PAGE.reset(token)


def print_heading(command: str, *packages: str) -> None:
    """Print what every table needs above it: command, project version, date and machine."""
    from logitstore import __version__

    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    machine = describe_machine(*packages)
    if (page := _PAGE.get()) is not None:
        page.heading = {"command": command, "version": __version__, "date": today, "machine": machine}
    else:
        print(f"`{command}`, logitstore {__version__}, {today}; {machine}\n", flush=True)


def print_text(text: str) -> None:
    """Print a remark, and an empty line."""
    if (page := _PAGE.get()) is not None:
        page.parts.append({"text": " ".join(text.split())})
    else:
        print(text + "\n", flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table; columns after the first are aligned to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    if (page := _PAGE.get()) is not None:
        page.parts.append({"header": list(header), "rows": cells})
        return
    lines = [list(header), ["---", *(["---:"] * (len(header) - 1))], *cells]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n", flush=True)


def tell_step(what: str) -> None:
    """Say on stderr what is measured now."""
    _LOG.info("%s …", what)
