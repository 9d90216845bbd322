"""The actors of a capture and the calls they are at work on: all that the driver says to Ray."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.actor import CaptureActor, LoadedTeacher
from cluster.placement import ActorDemand
from cluster.settings import ClusterCaptureSettings

_LONGEST_REST_SECONDS = 300.0


@dataclass(kw_only=True, eq=False)
class Slot:
    """One actor: a number that stays through restarts, what it has loaded, and when it may be sent more."""

    number: int
    actor: Any
    loaded: LoadedTeacher | None = None
    is_loading: bool = False
    load_losses: int = 0
    restarts_in_a_row: int = 0
    rests_until: float = 0.0

    @property
    def is_ready(self) -> bool:
        return self.loaded is not None

    @property
    def host(self) -> str:
        return self.loaded.host if self.loaded is not None else "its machine"

    def rest(self, seconds: float) -> None:
        """Send it nothing for a while."""
        self.rests_until = time.monotonic() + seconds


@dataclass(frozen=True, kw_only=True)
class EndedCall:
    """A call that has ended one way or another; `ray.get(task)` says how. `unit` is None for a load."""

    slot: Slot
    unit: int | None
    task: Any


class ActorPool:
    """Starts actors, and knows their calls in the order in which they were made."""

    def __init__(self, settings: ClusterCaptureSettings, demand: ActorDemand, count: int) -> None:
        actor_class: Any = CaptureActor
        self._calls: dict[Any, tuple[Slot, int | None]] = {}
        self.slots = [
            Slot(
                number=number,
                actor=actor_class.options(num_cpus=demand.cpus, num_gpus=demand.gpus).remote(settings),
            )
            for number in range(count)
        ]

    @property
    def num_ready(self) -> int:
        return sum(slot.is_ready for slot in self.slots)

    def load(self, slot: Slot) -> None:
        """Let an actor load the teacher."""
        slot.is_loading = True
        self._calls[slot.actor.load.remote()] = slot, None

    def capture(self, slot: Slot, unit: int, attempt: str) -> None:
        """Send a unit to an actor."""
        self._calls[slot.actor.capture.remote(unit, attempt)] = slot, unit

    def wait(self, timeout: float) -> Iterator[EndedCall]:
        """Calls that have ended, oldest first; none of an actor that was given up while they were handled."""
        if not self._calls:
            time.sleep(timeout)  # every actor rests
            return
        ray.wait(list(self._calls), num_returns=1, timeout=timeout)
        ended, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        is_ended = set(ended)
        for task in [task for task in self._calls if task in is_ended]:
            if task in self._calls:
                slot, unit = self._calls.pop(task)
                slot.is_loading = slot.is_loading and unit is not None
                yield EndedCall(slot=slot, unit=unit, task=task)

    def set_back(self, slot: Slot, rest_seconds: float) -> None:
        """An actor has lost what it was doing, and has to load again after a rest."""
        self._calls = {task: call for task, call in self._calls.items() if call[0] is not slot}
        slot.loaded, slot.is_loading = None, False
        slot.rest(rest_seconds)

    def restart(self, slot: Slot) -> None:
        """End an actor's process; Ray starts another, which rests longer each time that nothing went well between."""
        slot.restarts_in_a_row += 1
        self.set_back(slot, min(_LONGEST_REST_SECONDS, 2.0 ** min(slot.restarts_in_a_row, 10)))
        ray.kill(slot.actor, no_restart=False)

    def release(self, slot: Slot) -> None:
        """Let an actor go, and its machine with it."""
        self.slots = [other for other in self.slots if other is not slot]
        self.set_back(slot, 0.0)
        with contextlib.suppress(RayError, OSError, RuntimeError, ValueError):
            ray.kill(slot.actor)

    def close(self) -> None:
        """Let all actors go, whatever state they or the cluster are in."""
        for slot in list(self.slots):
            self.release(slot)
