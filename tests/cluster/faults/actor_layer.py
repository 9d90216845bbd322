"""What `RayCluster` makes of a cluster, in a process of its own: `actor_layer.py ADDRESS CAPTURE.yaml` prints JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


class LocalError(Exception):
    """One that can be pickled and not unpickled."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


def main(address: str, path: str) -> None:
    """Start an actor whose GPUs are of two machines, then one that fails in every way."""
    import ray
    from ray.exceptions import RayError
    from ray.util import placement_group_table

    from cluster.actor_groups import ActorGroup
    from cluster.connection import connect
    from cluster.placement import ActorDemand
    from cluster.ray_cluster import RayCluster
    from cluster.settings import ClusterCaptureSettings
    from logitstore.errors import TeacherError
    from logitstore.settings import read_settings

    settings = read_settings(ClusterCaptureSettings, path)

    def find_free() -> float:
        return float(ray.available_resources().get("GPU", 0.0))

    ended: set[int] = set()

    def fetch(cluster: RayCluster, call: int) -> Any:
        while call not in ended:
            ended.update(cluster.wait(1.0))
        ended.discard(call)
        return cluster.fetch(call)

    with connect(address):
        wait_for(lambda: find_free() == 2.0)
        free = [find_free()]
        cluster = RayCluster()
        demand = ActorDemand(cpus=1, gpus=2, across_machines=True)
        actor = cluster.start(0, ActorGroup(number=0, settings=settings, demand=demand))
        loaded = fetch(cluster, cluster.load(actor))
        wait_for(lambda: find_free() == 0.0)
        free.append(find_free())
        states = [placement_group_table(actor.group)["state"]]
        cluster.end(actor)
        wait_for(lambda: placement_group_table(actor.group)["state"] == "REMOVED")
        states.append(placement_group_table(actor.group)["state"])
        wait_for(lambda: find_free() == 2.0)
        free.append(find_free())

        class FailingActor:
            def __init__(self, settings: ClusterCaptureSettings) -> None:
                pass

            def capture(self, unit: int, attempt: str, care: object) -> None:
                if unit == 0:
                    raise TeacherError("expected")
                if unit == 1:
                    raise LocalError("a", "b")
                os._exit(1)

        cluster = RayCluster(ray.remote(FailingActor))
        failing = cluster.start(0, ActorGroup(number=0, settings=settings, demand=ActorDemand(cpus=1, gpus=0)))
        errors = []
        for unit in range(3):  # one by one: the death of the actor would take an error on its way along
            try:
                fetch(cluster, cluster.capture(failing, unit, "attempt", None))
            except (RayError, TeacherError) as error:
                kinds = [kind.__name__ for kind in type(error).__mro__]
                names = ("TeacherError", "UnserializableException", "ActorDiedError")
                errors.append(next((name for name in names if name in kinds), kinds[0]))
        cluster.end(failing)
        errors.append(None)  # ending one that is dead is no error
    result = {"machines_of_group": list(loaded.node_ids), "free_gpus": free, "group": states, "errors": errors}
    print(json.dumps(result))


def wait_for(condition: Callable[[], bool]) -> None:
    """Other processes are polled; nothing is timed by it."""
    while not condition():
        time.sleep(0.05)


if __name__ == "__main__":
    main(*sys.argv[1:])
