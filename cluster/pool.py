"""The actors of a capture and the calls they are at work on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cluster.actor import LoadedTeacher
from cluster.actor_groups import ActorGroup
from cluster.ray_cluster import Cluster
from logitstore.unit_records import UnitCare

_LONGEST_REST_SECONDS = 300.0


@dataclass(kw_only=True, eq=False)
class Slot:
    """A place for an actor: one after the other may take it, and its number stays.

    Attributes:
        number: that no other place has or had.
        group: which kind of actor takes it.
        actor: who has it; None before it is started, or while the place rests.
        loaded: what the actor has loaded.
        calls: that have not ended, oldest first, with the unit; None for a load.
        busy_since: when the actor began with the oldest of them, as far as one can tell from here.
        load_losses: actors that died here while they loaded, one after the other.
        load_failures: loads that failed here for trouble that may pass, one after the other.
        warned_unit: for which somebody was warned that it takes long.
        restarts_in_a_row: of actors that failed, with nothing captured between.
        rests_until: no actor is started before.
        is_retired: its machine will be taken away; nothing is sent to it any more.
    """

    number: int
    group: ActorGroup
    actor: Any = None
    loaded: LoadedTeacher | None = None
    calls: dict[int, int | None] = field(default_factory=dict)
    busy_since: float = 0.0
    load_losses: int = 0
    load_failures: int = 0
    warned_unit: int | None = None
    restarts_in_a_row: int = 0
    rests_until: float = 0.0
    is_retired: bool = False

    @property
    def is_ready(self) -> bool:
        return self.loaded is not None

    @property
    def unit(self) -> int | None:
        """The unit that its actor is at; None for none, or a load."""
        return next(iter(self.calls.values()), None)

    @property
    def host(self) -> str:
        return self.loaded.host if self.loaded is not None else "its machine"


@dataclass(frozen=True, kw_only=True)
class EndedCall:
    """A call that has ended one way or another; `fetch` returns the answer or raises. `unit` is None for a load."""

    slot: Slot
    unit: int | None
    fetch: Callable[[], Any]


class ActorPool:
    """Places for actors, and who is at what.

    Args:
        cluster: where the actors are.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._slot_of: dict[int, Slot] = {}  # of each call
        self._unloaded: dict[int, Slot] = {}
        self._ready: set[int] = set()
        self._next_number = 0
        self.slots: dict[int, Slot] = {}

    @property
    def num_ready(self) -> int:
        return len(self._ready)

    def add(self, group: ActorGroup) -> Slot:
        """A new place; `load_rested` starts its actor."""
        slot = Slot(number=self._next_number, group=group)
        self._next_number += 1
        self.slots[slot.number] = self._unloaded[slot.number] = slot
        return slot

    def load_rested(self, now: float) -> None:
        """Start an actor in every place that has none and does not rest, and let it load the teacher."""
        for slot in [slot for slot in self._unloaded.values() if slot.rests_until <= now]:
            del self._unloaded[slot.number]
            slot.actor = self._cluster.start(slot.number, slot.group)
            self._note_call(slot, self._cluster.load(slot.actor), None)

    def admit(self, slot: Slot, loaded: LoadedTeacher) -> None:
        """Its actor has loaded the teacher."""
        slot.loaded, slot.load_losses, slot.load_failures = loaded, 0, 0
        self._ready.add(slot.number)

    def capture(self, slot: Slot, unit: int, attempt: str, care: UnitCare | None = None) -> None:
        """Send a unit to an actor."""
        self._note_call(slot, self._cluster.capture(slot.actor, unit, attempt, care), unit)

    def take_back(self, slot: Slot) -> list[int]:
        """Units that an actor has been sent and has not begun, as far as one can tell from here: it will not."""
        later = list(slot.calls)[1:]
        for call in later:
            self._cluster.forget(call, cancel=True)
            del self._slot_of[call]
        return [unit for unit in (slot.calls.pop(call) for call in later) if unit is not None]

    def wait(self, timeout: float) -> Iterator[EndedCall]:
        """Calls that have ended, oldest first; none of an actor that was given up while they were handled."""
        for call in self._cluster.wait(timeout):
            slot = self._slot_of.pop(call, None)
            if slot is not None:
                unit = slot.calls.pop(call)
                slot.busy_since = time.monotonic()
                yield EndedCall(slot=slot, unit=unit, fetch=partial(self._cluster.fetch, call))

    def forgive(self, seconds: float) -> None:
        """Nobody has been at anything for so long, as far as it counts."""
        for slot in self.slots.values():
            slot.busy_since += seconds

    def set_back(self, slot: Slot, rest_seconds: float) -> None:
        """An actor is lost, or to be given up: another will take its place after a rest."""
        self._end(slot)
        slot.rests_until = time.monotonic() + rest_seconds
        self._unloaded[slot.number] = slot

    def restart(self, slot: Slot) -> None:
        """Replace an actor by another, after a rest that is longer each time that nothing went well between."""
        slot.restarts_in_a_row += 1
        self.set_back(slot, min(_LONGEST_REST_SECONDS, 2.0 ** min(slot.restarts_in_a_row, 10)))

    def release(self, slot: Slot) -> None:
        """Let an actor go, and its machine with it."""
        self._end(slot)
        self._unloaded.pop(slot.number, None)
        del self.slots[slot.number]

    def close(self) -> None:
        """Let all actors go, whatever state they or the cluster are in."""
        for slot in list(self.slots.values()):
            self.release(slot)

    def _note_call(self, slot: Slot, call: int, unit: int | None) -> None:
        if not slot.calls:
            slot.busy_since = time.monotonic()
        slot.calls[call] = unit
        self._slot_of[call] = slot

    def _end(self, slot: Slot) -> None:
        for call in slot.calls:
            self._cluster.forget(call)
            del self._slot_of[call]
        slot.calls.clear()
        slot.loaded = slot.warned_unit = None
        self._ready.discard(slot.number)
        if slot.actor is not None:
            self._cluster.end(slot.actor)
            slot.actor = None
