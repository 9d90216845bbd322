"""How fast a capture goes of late: rates of counts that only grow, over a window that moves with them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

# Long enough to even out units that end together, short enough to show within minutes that machines came or went.
WINDOW_SECONDS = 120.0
# Where units are slow, the window is as long as it takes to see so many of them end.
WINDOW_UNITS = 30
_SECONDS_BETWEEN_SAMPLES = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    time: float
    units: int
    positions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Per second, over the window."""

    units: float
    positions: float


class RateWindow:
    """Samples of a run's counts, a second apart at least, no older than the window needs: a few hundred at most."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque()

    def add(self, *, time: float, units: int, positions: int) -> None:
        """Take note of where the counts stand; the first call is where the clock starts.

        Args:
            time: seconds, of any clock that does not go back.
            units: units that have ended in this run.
            positions: positions that this run has committed.
        """
        samples = self._samples
        if samples and (units == samples[-1].units or time - samples[-1].time < _SECONDS_BETWEEN_SAMPLES):
            return
        samples.append(_Sample(time=time, units=units, positions=positions))
        while len(samples) > 2 and _is_enough(samples[1], time, units):
            samples.popleft()

    def compute(self, *, time: float, units: int, positions: int) -> Rates | None:
        """Rates from the beginning of the window until now; None before a unit has ended in it."""
        first = self._samples[0] if self._samples else None  # once: another thread may ask meanwhile
        if first is None or units <= first.units:
            return None
        seconds = max(1e-9, time - first.time)
        return Rates(units=(units - first.units) / seconds, positions=(positions - first.positions) / seconds)


def _is_enough(first: _Sample, time: float, units: int) -> bool:
    """Whether a window that begins with this sample is long enough."""
    return time - first.time >= WINDOW_SECONDS and units - first.units >= WINDOW_UNITS
