"""Repeated timings of alternatives, taken in turns: a machine that drifts drifts for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of every repetition of one alternative."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Largest less smallest, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def time_in_turns(alternatives: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Run every alternative once to warm up, then all of them in turns; wall-clock seconds of each repetition."""
    for run in alternatives.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(repeats):
        for name, run in alternatives.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(seconds=tuple(values)) for name, values in seconds.items()}


def format_rate(count: float, timing: Timing) -> str:
    """Things per second at the median, with the spread: `812,000 ±4%`."""
    return f"{count / timing.median:,.0f} ±{50 * timing.spread:.0f}%"
