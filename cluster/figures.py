"""Counts of one run of a capture, and how fast they grow."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from cluster.rates import Rates, RateWindow
from logitstore.capture import Receipt
from logitstore.store.commit import Outcome

Phase = Literal["loading", "capturing", "finishing"]


@dataclass(kw_only=True)
class CaptureFigures:
    """Counts of one run of a capture. `units_before` were committed when it started.

    `phase` is what the driver is at: no unit can be captured before a teacher is loaded, and a manifest is written
    when all have ended. `actor_hangs` are of the `actor_losses`; `lost_races` are
    units that were found committed: by another capture, or by an actor of this one that was lost before it said so.
    """

    phase: Phase = "loading"
    units_planned: int = 0
    units_before: int = 0
    units_captured: int = 0
    lost_races: int = 0
    quarantined: int = 0
    units_in_flight: int = 0
    failures: int = 0
    actor_losses: int = 0
    actor_hangs: int = 0
    actors_ready: int = 0
    actors_wanted: int = 0
    records: int = 0
    positions: int = 0
    bytes: int = 0
    documents: int = 0
    dead_letters: int = 0
    dead_letter_counts: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)
    window: RateWindow = field(default_factory=RateWindow)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def mean_positions_per_second(self) -> float:
        """Since the start, loading included: what a machine was worth that had to be paid for all the time."""
        return self.positions / max(1e-9, self.seconds)

    @property
    def units_done(self) -> int:
        return self.units_before + self.units_captured + self.lost_races + self.quarantined

    @property
    def units_left(self) -> int:
        return max(0, self.units_planned - self.units_done)

    @property
    def rates(self) -> Rates | None:
        """Units that end and positions that are committed per second, of late; None before the first unit has ended."""
        return self.window.compute(time=time.monotonic(), units=self._units_ended, positions=self.positions)

    @property
    def seconds_left(self) -> float | None:
        """Estimate at the pace of late; None before the first unit of this run has ended."""
        rates = self.rates
        return None if rates is None else self.units_left / rates.units

    @property
    def _units_ended(self) -> int:
        """Units that are done because of this run, or while it went on."""
        return self.units_captured + self.lost_races

    def observe(self) -> None:
        """Take note of where the counts stand, for the rates. Loading is left out of them: it says nothing of pace."""
        if self.phase != "loading":
            self.window.add(time=time.monotonic(), units=self._units_ended, positions=self.positions)

    def count_receipt(self, receipt: Receipt) -> None:
        """Add what a unit brought; one that is found committed, by whomever, brings nothing."""
        if receipt.outcome is Outcome.LOST:
            self.lost_races += 1
            return
        self.units_captured += 1
        self.records += receipt.records
        self.positions += receipt.positions
        self.bytes += receipt.bytes
        self.documents += receipt.documents
        self.dead_letters += receipt.dead_letters
        self.dead_letter_counts.update(receipt.dead_letter_counts)
