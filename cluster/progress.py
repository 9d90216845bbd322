"""Progress of a capture: figures, a live bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from logitstore.capture import Receipt
from logitstore.store.commit import Outcome

_LOG = logging.getLogger("logitstore.capture")
_SECONDS_BETWEEN_LINES = 15.0


@dataclass(kw_only=True)
class CaptureFigures:
    """Counts of one run of a capture. `units_before` were committed when it started."""

    units_planned: int = 0
    units_before: int = 0
    units_captured: int = 0
    lost_races: int = 0
    quarantined: int = 0
    failures: int = 0
    actor_losses: int = 0
    actors_ready: int = 0
    records: int = 0
    positions: int = 0
    bytes: int = 0
    documents: int = 0
    dead_letters: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def units_done(self) -> int:
        return self.units_before + self.units_captured + self.lost_races + self.quarantined

    @property
    def positions_per_second(self) -> float:
        return self.positions / max(1e-9, self.seconds)

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the units of this run; None before the first."""
        done = self.units_captured + self.lost_races
        if not done:
            return None
        return self.seconds / done * (self.units_planned - self.units_done)

    def count_receipt(self, receipt: Receipt) -> None:
        """Add what a unit brought; one that another capture committed first brings nothing."""
        if receipt.outcome is Outcome.LOST:
            self.lost_races += 1
            return
        self.units_captured += 1
        self.records += receipt.records
        self.positions += receipt.positions
        self.bytes += receipt.bytes
        self.documents += receipt.documents
        self.dead_letters += receipt.dead_letters

    def describe(self) -> str:
        left = "?" if self.seconds_left is None else f"{self.seconds_left:.0f} s"
        return (
            f"{self.units_done}/{self.units_planned} units, {self.positions:,} positions, "
            f"{self.positions_per_second:,.0f} positions/s, {left} left, {self.actors_ready} actors, "
            f"{self.failures} failures, {self.dead_letters} dead letters"
        )


class CaptureProgress:
    """Shows figures while they change: use as a context manager, call `update` after every change."""

    def __init__(self, figures: CaptureFigures, *, console: Console | None = None, quiet: bool = False) -> None:
        console = console or Console(stderr=True)
        self._figures = figures
        self._bar: Progress | None = None
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
        self._quiet = quiet
        if console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("capture"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                console=console,
            )
            self._task = self._bar.add_task("capture", total=None, figures="starting")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self) -> None:
        """Show the figures as they are now."""
        figures = self._figures
        if self._bar is not None:
            left = "" if figures.seconds_left is None else f", {figures.seconds_left:.0f} s left"
            text = f"{figures.positions_per_second:,.0f} positions/s{left}, {figures.failures} failures"
            self._bar.update(self._task, total=figures.units_planned, completed=figures.units_done, figures=text)
        elif not self._quiet and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            _LOG.info("%s", figures.describe())
