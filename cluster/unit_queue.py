"""The decisions of a capture: which unit an actor gets next, and whom a failure is held against.

Nothing here knows Ray, storage or the clock. Actors are numbers, which stay the same when an actor is restarted.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

_LONGEST_WAIT_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class QueueLimits:
    """When trouble is held against a unit, an actor or everything.

    Attributes:
        tries: failures that count before a unit is set aside.
        losses: actors lost while they ran a unit before it is set aside: then it is the cause, not the victim.
        outside_tries: failures of storage, each after other units went well, before a unit is set aside.
        failures_in_a_row: of one actor, on any units, before it is restarted.
        hopeless_units: units that fail before anything goes well until the capture is given up.
        patience_seconds: how long storage may fail for everybody.
    """

    tries: int = 3
    losses: int = 6
    outside_tries: int = 8
    failures_in_a_row: int = 2
    hopeless_units: int = 10
    patience_seconds: float = 120.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to do after a failure.

    Attributes:
        unit: the one it is held against; None where no unit was running.
        attempts: what has been held against the unit so far, of this kind.
        set_aside: give the unit up.
        restart_actor: end the actor's process and load the teacher again.
        give_up: end the capture, nothing goes well.
    """

    unit: int | None
    attempts: int = 0
    set_aside: bool = False
    restart_actor: bool = False
    give_up: bool = False


@dataclass(kw_only=True)
class _Actor:
    in_flight: deque[int] = field(default_factory=deque)
    is_ready: bool = False
    period: int = 0  # ends with every success and every restart
    failures_in_a_row: int = 0
    is_proven: bool = False  # has captured a unit since it was loaded


@dataclass(kw_only=True)
class _Trouble:
    failed_on: set[int] = field(default_factory=set)
    failed_in: set[tuple[int, int]] = field(default_factory=set)  # (actor, period): a failure counts once in each
    losses: int = 0
    outside_failures: int = 0
    outside_in_a_row: int = 0
    successes_at_outside_failure: int = -1


class UnitQueue:
    """Units still to do, who has them, and what has gone wrong with each.

    Whatever happens to a unit costs the same among thousands of actors and a million units as it does among ten.

    Args:
        units: to be captured, in this order.
        limits: of patience.
    """

    def __init__(self, units: Iterable[int], limits: QueueLimits) -> None:
        self._pending = deque(units)
        self._waiting: list[tuple[float, int]] = []  # heap of (until when, unit)
        self._limits = limits
        self._actors: dict[int, _Actor] = {}
        self._busy: dict[int, _Actor] = {}  # who has units in flight
        self._num_ready = 0
        self._troubles: dict[int, _Trouble] = {}
        self._successes = 0
        self._has_captured = False
        self._failed_units: set[int] = set()
        self._failed_actors: set[int] = set()
        self._outside_since: float | None = None
        self._outside_failures = 0
        self._outside_actors: set[int] = set()

    @property
    def num_pending(self) -> int:
        """Units that nobody has, those that wait included."""
        return len(self._pending) + len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        return sum(len(actor.in_flight) for actor in self._busy.values())

    @property
    def num_useful(self) -> int:
        """The most actors that can be of use: one for each pending unit, and those at work that may take more."""
        return self.num_pending + sum(actor.is_ready for actor in self._busy.values())

    @property
    def wants_reserve(self) -> bool:
        """Whether a unit is with an actor that has captured nothing since it was loaded."""
        return not all(actor.is_proven for actor in self._busy.values())

    @property
    def has_units(self) -> bool:
        """Whether anything is pending or in flight."""
        return bool(self._pending or self._waiting or self._busy)

    def list_in_flight(self) -> list[int]:
        """Units that are with an actor, in no order."""
        return [unit for actor in self._busy.values() for unit in actor.in_flight]

    def has_due(self, now: float) -> bool:
        """Whether there is a unit that somebody may take now."""
        return bool(self._pending) or bool(self._waiting and self._waiting[0][0] <= now)

    def admit(self, actor: int) -> None:
        """An actor has loaded the teacher and takes units."""
        record = self._actor(actor)
        self._num_ready += not record.is_ready
        record.is_ready = True

    def retire(self, actor: int) -> None:
        """An actor takes no more units; what it has it keeps until it ends or gives it back."""
        record = self._actor(actor)
        self._num_ready -= record.is_ready
        record.is_ready = False

    def hand_back(self, actor: int, unit: int) -> None:
        """A unit that an actor has not ended goes to others first, for free."""
        self._end(actor, unit)
        self._pending.appendleft(unit)

    def remove(self, actor: int) -> None:
        """An actor takes no more units, at least until it is admitted again; what it had goes back, for free."""
        self.retire(actor)
        record = self._actor(actor)
        self._pending.extendleft(reversed(record.in_flight))
        record.in_flight.clear()
        self._busy.pop(actor, None)
        record.is_proven = False
        record.period += 1
        record.failures_in_a_row = 0

    def take(self, actor: int, *, now: float, ahead: int = 1) -> int | None:
        """The next unit for an actor that has fewer than `ahead`, or None where it has nothing to do now.

        A unit that failed on the actor is left to others while there are any: so one broken actor can hold no more
        than one failure against it.
        """
        record = self._actor(actor)
        if not record.is_ready or len(record.in_flight) >= ahead:
            return None
        while self._waiting and self._waiting[0][0] <= now:
            # Before the others: while these are done, they can still show that the storage is well.
            self._pending.appendleft(heapq.heappop(self._waiting)[1])
        for index, unit in enumerate(self._pending):
            trouble = self._troubles.get(unit)
            if trouble is None or not self._is_for_others(actor, trouble):
                del self._pending[index]
                record.in_flight.append(unit)
                self._busy[actor] = record
                return unit
        return None

    def find_spare(self, actors: Iterable[int]) -> list[int]:
        """Which of these actors can go because all units are handed out to others.

        Of the idle ones the best stays while a unit is with an actor that has captured nothing since it was loaded.
        """
        if self._pending or self._waiting or not self._busy:
            return []
        idle = [number for number in actors if not self._actor(number).in_flight]
        idle.sort(key=lambda number: (self._actor(number).is_proven, self._actor(number).is_ready))
        return idle[:-1] if self.wants_reserve else idle

    def succeed(self, actor: int, unit: int, *, was_captured: bool) -> None:
        """A unit is committed: captured by this actor, or found committed by somebody else."""
        record = self._end(actor, unit)
        self._troubles.pop(unit, None)
        self._successes += 1
        self._outside_since = None
        self._outside_failures = 0
        self._outside_actors.clear()
        if was_captured:
            self._has_captured = record.is_proven = True
            record.failures_in_a_row = 0
            record.period += 1

    def fail(self, actor: int, unit: int) -> Verdict:
        """The actor lives and says that it cannot capture the unit."""
        record, trouble = self._end(actor, unit), self._trouble(unit)
        record.failures_in_a_row += 1
        trouble.failed_on.add(actor)
        trouble.failed_in.add((actor, record.period))
        self._failed_units.add(unit)
        self._failed_actors.add(actor)
        attempts = len(trouble.failed_in)
        is_too_often = attempts >= self._limits.tries
        if not is_too_often:
            self._pending.append(unit)
        return Verdict(
            unit=unit,
            attempts=attempts,
            set_aside=is_too_often,
            restart_actor=record.failures_in_a_row >= self._limits.failures_in_a_row,
            give_up=not self._has_captured
            and len(self._failed_units) >= self._limits.hopeless_units
            and not self._works_elsewhere(self._failed_actors),
        )

    def fail_outside(self, actor: int, unit: int, *, now: float) -> Verdict:
        """Storage or network failed under the unit: it waits, longer each time, and is tried again."""
        trouble = self._trouble(unit)
        self._end(actor, unit)
        trouble.failed_on.add(actor)
        waits_until = now + min(_LONGEST_WAIT_SECONDS, 2.0 ** min(trouble.outside_in_a_row, 10))
        trouble.outside_in_a_row += 1
        # With nothing else going well it says something about the storage and nothing about the unit.
        if self._successes > trouble.successes_at_outside_failure:
            trouble.outside_failures += 1
            trouble.successes_at_outside_failure = self._successes
        self._outside_since = now if self._outside_since is None else self._outside_since
        self._outside_failures += 1
        self._outside_actors.add(actor)
        is_too_often = trouble.outside_failures >= self._limits.outside_tries
        if not is_too_often:
            heapq.heappush(self._waiting, (waits_until, unit))
        return Verdict(
            unit=unit,
            attempts=trouble.outside_failures,
            set_aside=is_too_often,
            give_up=not is_too_often
            and now - self._outside_since >= self._limits.patience_seconds
            and self._outside_failures >= self._limits.outside_tries
            and not self._works_elsewhere(self._outside_actors),
        )

    def put_off(self, unit: int, *, now: float) -> None:
        """A unit that was to be set aside, and could not be, is tried again later."""
        heapq.heappush(self._waiting, (now + _LONGEST_WAIT_SECONDS, unit))

    def lose(self, actor: int, *, is_excused: bool = False) -> Verdict:
        """The actor is gone. An actor runs its units in order, so only the oldest it had can be the cause.

        Where the loss `is_excused`, because the actor's machine was to be taken away, it is held against no unit.
        """
        running = next(iter(self._actor(actor).in_flight), None)
        if running is None or is_excused:
            self.remove(actor)
            return Verdict(unit=running)
        trouble = self._trouble(running)
        trouble.losses += 1
        trouble.failed_on.add(actor)
        is_too_often = trouble.losses >= self._limits.losses
        if is_too_often:
            self._end(actor, running)
        self.remove(actor)
        return Verdict(unit=running, attempts=trouble.losses, set_aside=is_too_often)

    def forget(self, actor: int) -> None:
        """An actor has gone for good; what it had goes back."""
        self.remove(actor)
        del self._actors[actor]

    def _end(self, actor: int, unit: int) -> _Actor:
        """A unit is not with its actor any more."""
        record = self._actor(actor)
        record.in_flight.remove(unit)
        if not record.in_flight:
            self._busy.pop(actor, None)
        return record

    def _actor(self, actor: int) -> _Actor:
        return self._actors.setdefault(actor, _Actor())

    def _trouble(self, unit: int) -> _Trouble:
        return self._troubles.setdefault(unit, _Trouble())

    def _is_for_others(self, actor: int, trouble: _Trouble) -> bool:
        if actor not in trouble.failed_on:
            return False
        ready = sum(self._actors[number].is_ready for number in trouble.failed_on if number in self._actors)
        return self._num_ready > ready

    def _works_elsewhere(self, troubled: set[int]) -> bool:
        """Whether somebody who had no such trouble yet is at work, and may still show that all is well."""
        return any(number not in troubled for number in self._busy)
