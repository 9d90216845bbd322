"""What a capture says to Ray, where Ray is not asked."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import RayError

from cluster import ray_cluster
from cluster.actor_groups import ActorGroup
from cluster.placement import ActorDemand
from cluster.ray_cluster import RayCluster
from cluster.settings import ClusterCaptureSettings
from logitstore.settings import build_settings


class RefusedActor:
    """Of a class that Ray cannot start just now."""

    @classmethod
    def options(cls, **_: Any) -> type[RefusedActor]:
        return cls

    @classmethod
    def remote(cls, *_: Any) -> None:
        raise RayError("the head is gone")


def test_machines_of_an_actor_that_cannot_be_started_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    group, freed = object(), []

    def free(found: object) -> None:
        freed.append(found)
        raise RuntimeError("nor does the head hear of that")

    monkeypatch.setattr(ray_cluster, "placement_group", lambda *_, **__: group)
    monkeypatch.setattr(ray_cluster, "PlacementGroupSchedulingStrategy", lambda **_: None)
    monkeypatch.setattr(ray_cluster, "remove_placement_group", free)
    values = {"store": "s", "corpus": {"files": ["a.txt"]}, "teacher": {"model": "m"}}
    settings = build_settings(ClusterCaptureSettings, values, where="test")
    demand = ActorDemand(cpus=1, gpus=2, across_machines=True)
    with pytest.raises(RayError, match="the head is gone"):
        RayCluster(RefusedActor).start(0, ActorGroup(number=0, settings=settings, demand=demand))
    assert freed == [group]
