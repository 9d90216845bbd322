"""What the commands' output looks like: consoles, numbers as text, tables, bars and progress.

Results go to `print_result`, stdout; whatever else there is to say goes to stderr. Colours appear on terminals only,
and neither they nor bold letters where NO_COLOR is set; piped output has a width of its own, so that it does not depend
on who reads it. Progress is drawn on terminals alone that can draw a line again. Names that were read somewhere, in a
store for example, steer no terminal: see `make_visible`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tools.visible_text import make_visible

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

_PIPED_WIDTH = 110
_WIDEST = 100_000  # of what is only measured
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def open_console(*, stderr: bool = False, markup: bool = False) -> Console:
    """A console on stdout or stderr as they are now; `[bold]` and the like are plain text unless asked for."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PIPED_WIDTH
    # Rich takes NO_COLOR to leave bold and dim letters: those are escape sequences, too.
    system: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    return Console(stderr=stderr, width=width, highlight=False, markup=markup, emoji=False, color_system=system)


def can_redraw(console: Console) -> bool:
    """Whether a console is a terminal on which a line can be drawn again; FORCE_COLOR makes no pipe one."""
    return console.file.isatty() and console.is_terminal and not console.is_dumb_terminal


def print_result(*parts: RenderableType) -> None:
    """Print parts of a result on stdout, a blank line between them."""
    from rich.text import Text

    console = open_console()
    with console.capture() as capture:
        for i, part in enumerate(parts):
            if i:
                console.print()
            # Lines of plain text are left to the terminal to wrap: addresses stay in one piece.
            console.print(part, soft_wrap=isinstance(part, str | Text))
    # Tables are padded to their width; nobody needs that at the end of a line.
    print("\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n")))


def print_json(values: object) -> None:
    """Print the one JSON document of a command on stdout; a model of pydantic as its plain values.

    JSON knows neither NaN nor infinity: such figures are null, as unknown ones are.
    """
    dump = getattr(values, "model_dump", None)
    plain = _leave_finite(dump(mode="json") if dump else values)
    print(json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False))


def _leave_finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _leave_finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_leave_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_note(message: str) -> None:
    """Print a line on stderr that is good to know; nothing under --quiet."""
    if logging.getLogger("tools").getEffectiveLevel() < logging.ERROR:
        open_console(stderr=True).print(make_visible(message, keep_lines=True), soft_wrap=True)


def print_error(message: str) -> None:
    """Print what has gone wrong on stderr."""
    open_console(stderr=True).print(make_visible(message, keep_lines=True), style="red", soft_wrap=True)


def format_count(count: float) -> str:
    """A number of things: 1,234,567."""
    return f"{count:,.0f}"


def count_things(count: int, thing: str) -> str:
    """A number of things by their name: 1 unit, 2,000 units."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def format_short(count: float) -> str:
    """A large number in three digits: 1.23M."""
    for unit in ("", "k", "M", "G"):
        if abs(count) < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T"


def format_bytes(num_bytes: float) -> str:
    """Bytes with a decimal unit: 999 B, 1.23 MB."""
    size, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB", "PB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.3g} {units[0]}"


def format_seconds(seconds: float) -> str:
    """A span of time in its two largest units: 8.3 s, 4 min 10 s, 3 h 5 min, 12 d 6 h."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def format_share(share: float) -> str:
    """A part of a whole in percent; what is less than a tenth of a percent is not written as nothing."""
    return "0%" if share == 0 else "<0.1%" if 0 < share < 0.0005 else f"{100 * share:.1f}%"


def format_entropy(nats: float | None) -> str:
    """A mean entropy; None is unknown."""
    return "unknown" if nats is None else f"{nats:.3f} nats in the mean"


def format_loss(nats: float | None) -> str:
    """A loss in nats per token, with its perplexity; None is unknown."""
    if nats is None:
        return "unknown"
    return f"{nats:.3f} nats per token (perplexity {math.exp(min(nats, 700)):,.2f})"


def draw_bar(share: float, width: int = 24, *, rest: str = "") -> str:
    """A bar of blocks whose length is a share of the width, to an eighth of a character; `rest` fills the width."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    if share > 0:
        eighths = max(1, eighths)  # something is not nothing
    full, part = divmod(eighths, 8)
    bar = "█" * full + (_EIGHTHS[part] if part else "")
    return bar + rest * (width - len(bar))


def build_facts(facts: Sequence[tuple[str, object]]) -> Table:
    """Two columns: what, and its value; facts whose value is None are left out."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        if value is not None:
            table.add_row(name, value if isinstance(value, Text) else Text(make_visible(str(value), keep_lines=True)))
    return table


def build_table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table with a rule below its head; a column whose name starts with '#' holds numbers, to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        header_style="dim",
        pad_edge=False,
        show_edge=False,
        show_header=any(columns),
    )
    for name in columns:
        is_number = name.startswith("#")
        table.add_column(
            name.removeprefix("#"),
            justify="right" if is_number else "left",
            no_wrap=is_number,
            overflow="fold",
        )
    for row in rows:
        cells = (cell if isinstance(cell, Text) else Text(make_visible(str(cell), keep_lines=True)) for cell in row)
        table.add_row(*cells)
    return table


@dataclass(frozen=True, eq=False)
class SplitTable:
    """A table of `build_table` that goes on below itself, under its first column, where it is wider than its place.

    Rich would cut numbers short then, and leave out the first column altogether.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The parts, each with as many columns as find room."""
        stop = 1
        while stop < len(self.columns):
            start = stop
            stop += 1
            while stop < len(self.columns) and self._measure(console, start, stop + 1) <= options.max_width:
                stop += 1
            if start > 1:
                yield ""
            yield self._build(start, stop)

    def _build(self, start: int, stop: int) -> Table:
        rows = [(row[0], *row[start:stop]) for row in self.rows]
        return build_table(self.title if start == 1 else None, [self.columns[0], *self.columns[start:stop]], rows)

    def _measure(self, console: Console, start: int, stop: int) -> int:
        whole = console.options.update_width(_WIDEST)
        return int(console.measure(self._build(start, stop), options=whole).maximum)


def build_histogram(title: str, labels: Sequence[str], counts: Sequence[int], *, style: str = "cyan") -> Table:
    """Shares of the counts as horizontal bars."""
    from rich.text import Text

    total, largest = max(1, sum(counts)), max([1, *counts])
    rows = [
        (label, Text(draw_bar(count / largest), style=style), format_share(count / total))
        for label, count in zip(labels, counts, strict=True)
    ]
    table = build_table(title, ["", "", "#"], rows)
    table.show_header = False
    table.columns[1].min_width = 24
    return table


@contextmanager
def show_progress(name: str, *, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr, on a terminal only, from the first report until the block ends.

    Yields a function to call with (done, total), and a text to show behind the bar if there is one.
    """
    console = open_console(stderr=True)
    if quiet or not can_redraw(console):
        yield lambda done, total, text="": None
        return
    from tools.progress_bar import build_progress

    progress = build_progress(name, console)
    task = progress.add_task(name, total=None, text="")

    def report(done: int, total: int, text: str = "") -> None:
        progress.update(task, completed=done, total=total, text=text)
        progress.start()

    try:
        yield report
    finally:
        progress.stop()
