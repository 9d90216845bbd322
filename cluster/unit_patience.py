"""How long an actor may be at a unit before it is taken to hang.

An actor that hangs looks well: its process lives, its machine answers, and its unit never ends. So the driver counts
the seconds since an actor began, and gives it up when they are too many. What is too many follows from what units took:

- ten times as long as the slowest unit that this run has seen of the actor's group, and ten minutes in any case: a
  storage that answers slowly, or a batch that is scored in halves, is no hang;
- six hours before a first unit of the group has ended, when nobody knows, and for a unit that is captured with care,
  one document at a time (`suspicion.py`): units are cut to take an hour at most;
- `actors.unit_seconds` where it is set, and never where it is null. Beside an endpoint it is null by default: there
  every request has a limit of its own, and waits for a server that is busy are long and in order.

Half of that time earns a warning. Seconds in which the driver itself stood still (it was stopped, its laptop slept, it
listed a million units) count for nobody. An actor that is given up is killed; its unit goes to others first, and is
held against the unit as a dead engine would be, unless the machine was to be taken away, which may be why it is slow.
What the actor had been sent ahead goes back for free, and its place rests before another takes it. Should the unit be
committed after all, it is committed once.

Loading is not counted here: an actor that loads and one that waits for its machine look the same to the driver. The
actor itself ends its process after `actors.load_seconds`, whatever holds it up, and leaves in its log where it was.
"""

from __future__ import annotations

from typing import Literal

TIMES_THE_SLOWEST = 10.0
LEAST_SECONDS = 600.0
FIRST_SECONDS = 6 * 3600.0


def find_unit_limit(
    setting: float | Literal["auto"] | None, *, slowest_seconds: float | None, with_care: bool
) -> float | None:
    """Seconds that a unit may take; None for as long as it likes.

    Args:
        setting: `actors.unit_seconds`.
        slowest_seconds: that a unit has taken in its group; None before the first.
        with_care: the unit is captured one document at a time.
    """
    if setting != "auto":
        return setting
    if slowest_seconds is None:
        return FIRST_SECONDS
    return max(FIRST_SECONDS if with_care else LEAST_SECONDS, TIMES_THE_SLOWEST * slowest_seconds)
