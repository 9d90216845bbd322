"""Progress of a capture: a live bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from cluster.figures import CaptureFigures

_LOG = logging.getLogger("logitstore.capture")
# Often while somebody may be looking whether it works at all, seldom once it has for a while: jobs take days.
_SECONDS_BETWEEN_FIRST_LINES = 15.0
_FIRST_LINES_SECONDS = 300.0
_SECONDS_BETWEEN_LINES = 60.0


def describe_figures(figures: CaptureFigures) -> str:
    """All of it in one line: '12/60 units, 5,120 positions/s, 3 min 10 s left, 2/2 actors, 4 units in flight'."""
    if figures.phase == "loading":
        return f"loading the teacher, {figures.actors_ready}/{figures.actors_wanted} actors"
    return f"{figures.units_done:,}/{figures.units_planned:,} units, {describe_pace(figures)}"


def describe_pace(figures: CaptureFigures) -> str:
    """How fast it goes, who is at work, and what has gone wrong, as far as anything has."""
    rates = figures.rates
    parts = [] if rates is None else [f"{rates.positions:,.0f} positions/s"]
    if figures.seconds_left:
        parts.append(f"{describe_seconds(figures.seconds_left)} left")
    if figures.phase == "finishing":
        return ", ".join([*parts, "writing the manifest"])
    parts.append(f"{figures.actors_ready}/{figures.actors_wanted} actors")
    parts.append(f"{count_things(figures.units_in_flight, 'unit')} in flight")
    if figures.lost_races:
        parts.append(f"{count_things(figures.lost_races, 'unit')} found committed")
    troubles = {
        "dead letter": figures.dead_letters,
        "failure": figures.failures,
        "lost actor": figures.actor_losses,
        "hanging actor": figures.actor_hangs,
    }
    parts += [count_things(count, what) for what, count in troubles.items() if count]
    return ", ".join([*parts, *([f"{figures.quarantined:,} set aside"] if figures.quarantined else [])])


def count_things(count: int, thing: str) -> str:
    """A number of things by their name: 1 unit, 2,000 units."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def describe_seconds(seconds: float) -> str:
    """A span of time in its two largest units: 8 s, 4 min 10 s, 3 h 5 min, 12 d 6 h."""
    whole = round(seconds)
    for size, name, below, part in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // below} {part}"
    return f"{whole} s"


class _BarWithFigures(Progress):
    """A bar with the figures below it: beside it, they would leave nothing of it on a terminal of 100 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["figures"])


class CaptureProgress:
    """Shows figures while they change: use as a context manager, call `update` after every change."""

    def __init__(self, figures: CaptureFigures, *, console: Console | None = None, quiet: bool = False) -> None:
        console = console or Console(stderr=True, force_terminal=sys.stderr.isatty())  # FORCE_COLOR makes no terminal
        self._figures = figures
        self._bar: Progress | None = None
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_FIRST_LINES
        self._quiet = quiet
        if console.is_terminal and not console.is_dumb_terminal and not quiet:
            columns = [TextColumn("capture"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
            self._bar = _BarWithFigures(*columns, console=console)
            self._task = self._bar.add_task("capture", total=None, figures=describe_figures(figures))

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._show()
            self._bar.stop()

    def update(self) -> None:
        """Show the figures as they are now."""
        self._figures.observe()
        if self._bar is not None:
            self._show()
        elif not self._quiet and time.monotonic() >= self._next_line:
            is_early = self._figures.seconds < _FIRST_LINES_SECONDS
            pause = _SECONDS_BETWEEN_FIRST_LINES if is_early else _SECONDS_BETWEEN_LINES
            self._next_line = time.monotonic() + pause
            _LOG.info("%s", describe_figures(self._figures))

    def _show(self) -> None:
        figures = self._figures
        if self._bar is None:
            return
        if figures.phase == "loading":
            self._bar.update(self._task, figures=describe_figures(figures))
        else:
            total, completed = figures.units_planned, figures.units_done
            self._bar.update(self._task, total=total, completed=completed, figures=describe_pace(figures))
