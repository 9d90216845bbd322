"""All that a capture says to Ray: machines, actors and the calls to them."""

from __future__ import annotations

import contextlib
import itertools
import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actor import CaptureActor
from cluster.actor_groups import ActorGroup
from cluster.draining import read_draining
from cluster.placement import Machine, read_machines
from logitstore.unit_records import UnitCare

# An actor without GPUs of its own, whose engine has those of a placement group, must not be told that it sees none.
_KEEP_GPUS_VISIBLE = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}


class Cluster(Protocol):
    """What a capture needs of a cluster. Calls are numbers, and end in any order; actors are whatever `start` gives."""

    def read_machines(self) -> Sequence[Machine]:
        """Every living machine."""
        ...

    def read_draining(self) -> Mapping[str, float | None]:
        """Seconds that machines have left which will be taken away; None for as long as they are needed."""
        ...

    def read_free(self) -> Mapping[str, float]:
        """Resources that nobody uses."""
        ...

    def start(self, number: int, group: ActorGroup) -> Any:
        """An actor, which need not be placed yet; `number` is of the place among the actors that it takes."""
        ...

    def end(self, actor: Any) -> None:
        """End an actor's process, or the wait for a machine; never an error."""
        ...

    def load(self, actor: Any) -> int:
        """Let it load the teacher; the answer is a `LoadedTeacher`."""
        ...

    def capture(self, actor: Any, unit: int, attempt: str, care: UnitCare | None) -> int:
        """Send it a unit; the answer is a `Receipt`."""
        ...

    def wait(self, timeout: float) -> list[int]:
        """Calls that have ended since the last time, in the order in which they were made; none after `timeout`."""
        ...

    def fetch(self, call: int) -> Any:
        """The answer of a call that has ended, or its error; once."""
        ...

    def forget(self, call: int, *, cancel: bool = False) -> None:
        """Nobody wants to know any more; if it has not begun and is to be cancelled, it will not."""
        ...


@dataclass(frozen=True, kw_only=True)
class RayActor:
    """An actor, with the placement group where it has one."""

    handle: Any
    group: PlacementGroup | None


class RayCluster:
    """The cluster that this process is connected to; see `Cluster`.

    Ray tells by a callback that a call has ended: waiting costs nothing per call, and nothing looks at thousands of
    references each time that one of them is ready.

    Args:
        actor_class: what actors are; `CaptureActor` by default.
    """

    def __init__(self, actor_class: Any = None) -> None:
        self._actor_class: Any = actor_class or CaptureActor
        self._numbers = itertools.count()
        self._calls: dict[int, Any] = {}
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    def read_machines(self) -> Sequence[Machine]:
        return read_machines()

    def read_draining(self) -> Mapping[str, float | None]:
        return read_draining()

    def read_free(self) -> Mapping[str, float]:
        free: dict[str, float] = ray.available_resources()
        return free

    def start(self, number: int, group: ActorGroup) -> RayActor:
        demand = group.demand
        if not demand.across_machines:
            handle = self._actor_class.options(
                num_cpus=demand.cpus,
                num_gpus=demand.gpus,
                resources=dict(demand.resources) or None,
                label_selector=dict(demand.labels) or None,
            ).remote(group.settings)
            return RayActor(handle=handle, group=None)
        selectors = [dict(demand.labels)] * len(demand.bundles) if demand.labels else None
        # As few machines as possible: its parts talk all the time.
        bundles = placement_group(demand.bundles, strategy="PACK", bundle_label_selector=selectors)
        try:
            handle = self._actor_class.options(
                num_cpus=demand.cpus,
                num_gpus=0,
                resources=dict(demand.resources) or None,
                runtime_env=_KEEP_GPUS_VISIBLE,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=bundles, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
                ),
            ).remote(group.settings)
        except BaseException:
            _free(bundles)  # nobody else would: it goes with its actor
            raise
        return RayActor(handle=handle, group=bundles)

    def end(self, actor: RayActor) -> None:
        with contextlib.suppress(RayError, OSError, RuntimeError, ValueError):
            ray.kill(actor.handle)
        if actor.group is not None:
            _free(actor.group)

    def load(self, actor: RayActor) -> int:
        return self._follow(actor.handle.load.remote())

    def capture(self, actor: RayActor, unit: int, attempt: str, care: UnitCare | None) -> int:
        return self._follow(actor.handle.capture.remote(unit, attempt, care))

    def wait(self, timeout: float) -> list[int]:
        ended = set()
        with contextlib.suppress(queue.Empty):
            ended.add(self._ended.get(timeout=timeout))
            while True:
                ended.add(self._ended.get_nowait())
        return sorted(ended & self._calls.keys())

    def fetch(self, call: int) -> Any:
        return ray.get(self._calls.pop(call))

    def forget(self, call: int, *, cancel: bool = False) -> None:
        reference = self._calls.pop(call, None)
        if cancel and reference is not None:
            with contextlib.suppress(RayError, OSError, RuntimeError, ValueError, TypeError):
                ray.cancel(reference)

    def _follow(self, reference: Any) -> int:
        number = next(self._numbers)
        self._calls[number] = reference
        # The future has the answer, too; but what `ray.get` makes of it is what the driver can read.
        reference.future().add_done_callback(lambda _: self._ended.put(number))
        return number


def _free(group: PlacementGroup) -> None:
    """Never an error: the cluster may be gone."""
    with contextlib.suppress(RayError, OSError, RuntimeError, ValueError):
        remove_placement_group(group)
