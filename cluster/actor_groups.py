"""How many actors there should be: groups of actors that are alike, on machines that come and go.

The rules, for each group: with a `count`, so many are asked for at once, and those that find no machine wait, which a
cluster that can grow takes for demand. Without one there are as many as the machines have room for, and at least one; a
machine that joins brings its own. What was once reached stays asked for while machines come and go, since the next one
may take the place of the last. There are no more actors than units, save those that wait for machines there are not:
nobody waits for them, later groups are asked for the units instead. None comes back that could not load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.placement import ActorDemand, Machine, build_teacher_demand, count_rooms
from cluster.settings import ClusterCaptureSettings

# Of the units before, how much the last one tells of how long the next one takes.
_LAST_SHARE = 0.3


@dataclass(kw_only=True, eq=False)
class ActorGroup:
    """Actors that are alike.

    Attributes:
        number: of the group.
        settings: of the capture, with the teacher as these actors run it.
        demand: what each asks for.
        count, most: as of `ActorGroupSettings`.
        room: actors that machines have room for now.
        reached: the most that they had room for.
        dropped: actors that could not load, and are not replaced.
        unit_seconds: that a unit takes one of them, of late; None before the first.
        slowest_seconds: that a unit has taken one of them in this run.
    """

    number: int
    settings: ClusterCaptureSettings
    demand: ActorDemand
    count: int | None = None
    most: int | None = None
    room: int = 0
    reached: int = 0
    dropped: int = 0
    unit_seconds: float | None = None
    slowest_seconds: float | None = None

    def note_unit(self, seconds: float) -> None:
        """One of them has captured a unit in so long."""
        typical = self.unit_seconds
        self.unit_seconds = seconds if typical is None else typical + _LAST_SHARE * (seconds - typical)
        self.slowest_seconds = max(seconds, self.slowest_seconds or 0.0)

    @property
    def wanted(self) -> int:
        """Actors there should be, whatever is left to do."""
        bounded = self.count if self.count is not None else min(self.reached, self.most or self.reached)
        return max(0, bounded - self.dropped)


def build_groups(settings: ClusterCaptureSettings, machines: Sequence[Machine]) -> list[ActorGroup]:
    """The groups of a capture's settings.

    Raises:
        ConfigError: what a group asks for cannot be.
    """
    groups = []
    for number, own in enumerate(settings.actors.list_groups()):
        teacher = settings.build_teacher(own)
        groups.append(
            ActorGroup(
                number=number,
                settings=settings.model_copy(update={"teacher": teacher}),
                demand=build_teacher_demand(own, machines, teacher),
                count=own.count,
                most=own.max,
            )
        )
    return groups


def find_room(groups: Sequence[ActorGroup], machines: Sequence[Machine]) -> None:
    """Take note of machines that have joined: groups without a count may grow."""
    rooms = count_rooms([group.demand for group in groups], [group.count or group.most for group in groups], machines)
    for group, room in zip(groups, rooms, strict=True):
        group.room, group.reached = room, max(group.reached, room)
    if not any(group.wanted + group.dropped for group in groups):
        groups[0].reached = 1  # there is no machine yet: one actor that waits tells the cluster what for


def plan_counts(groups: Sequence[ActorGroup], most: int | None, ready: Sequence[int] | None = None) -> list[int]:
    """How many actors of each group there should be now, earlier groups first.

    Args:
        groups: of the capture.
        most: of all actors together, since there are no more units; None while nobody knows.
        ready: actors of each group that have loaded, and so come before all that have not; none by default.
    """
    if most is None:
        return [group.wanted for group in groups]
    ready = ready or [0] * len(groups)
    counts = []
    left = max(0, most - sum(ready))
    for group, num_ready in zip(groups, ready, strict=True):
        count = min(group.wanted, num_ready + left)
        # What waits for a machine that there is not takes no unit from those that have one.
        left -= max(0, min(count, group.room) - num_ready)
        counts.append(count)
    return counts
