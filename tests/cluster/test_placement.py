"""How many actors a cluster has room for, and when one can never be placed."""

from __future__ import annotations

import pytest

from cluster.connection import PRIVATE_CLUSTER
from cluster.placement import ActorDemand, Machine, build_demand, check_placeable, count_actors, describe_machines
from cluster.settings import ActorSettings
from logitstore.errors import ConfigError


def build_machines(*nodes: dict[str, float]) -> list[Machine]:
    return [Machine(node_id=f"n{i}", resources=node) for i, node in enumerate(nodes)]


LAPTOP = {"CPU": 2.0, PRIVATE_CLUSTER: 1.0}
GPU_NODE = {"CPU": 16.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("settings", "nodes", "demand", "count"),
    [
        (ActorSettings(), [LAPTOP], ActorDemand(cpus=2, gpus=0), 1),
        (ActorSettings(), [{"CPU": 1.0}], ActorDemand(cpus=1, gpus=0), 1),
        (ActorSettings(), [{"CPU": 3.0}, {"CPU": 5.0}], ActorDemand(cpus=2, gpus=0), 3),
        (ActorSettings(), [GPU_NODE, GPU_NODE, {"CPU": 8.0}], ActorDemand(cpus=2, gpus=1), 8),
        (ActorSettings(gpus=0.5), [GPU_NODE], ActorDemand(cpus=2, gpus=0.5), 8),
        (ActorSettings(gpus=0), [GPU_NODE], ActorDemand(cpus=2, gpus=0), 8),
        (ActorSettings(count=3, cpus=8), [LAPTOP], ActorDemand(cpus=8, gpus=0), 3),
        (ActorSettings(), [], ActorDemand(cpus=1, gpus=0), 1),
    ],
)
def test_actors_of_a_cluster_are_as_set_or_as_many_as_fit(
    settings: ActorSettings, nodes: list[dict[str, float]], demand: ActorDemand, count: int
) -> None:
    assert build_demand(settings, nodes) == demand
    assert count_actors(settings, demand, nodes) == count


@pytest.mark.parametrize("demand", [ActorDemand(cpus=4, gpus=0), ActorDemand(cpus=1, gpus=1)])
def test_demand_that_this_machine_cannot_meet_is_refused_with_both_sides(demand: ActorDemand) -> None:
    with pytest.raises(ConfigError, match=rf"a machine with {demand}, .*, found 1 × \(2 CPUs, 0 GPUs\)"):
        check_placeable(demand, build_machines(LAPTOP))


def test_demand_that_fits_or_that_a_growing_cluster_may_meet_is_accepted() -> None:
    check_placeable(ActorDemand(cpus=2, gpus=0), build_machines(LAPTOP))
    check_placeable(ActorDemand(cpus=64, gpus=8), build_machines(GPU_NODE))


def test_nodes_are_described_by_kind() -> None:
    assert (
        describe_machines(build_machines(GPU_NODE, LAPTOP, GPU_NODE)) == "2 × (16 CPUs, 4 GPUs) + 1 × (2 CPUs, 0 GPUs)"
    )
    assert describe_machines([]) == "no machine"


def test_teacher_split_over_two_gpus_takes_two_of_each_machine() -> None:
    demand = build_demand(ActorSettings(), [GPU_NODE], num_gpus=2)
    assert demand == ActorDemand(cpus=2, gpus=2)
    assert count_actors(ActorSettings(), demand, [GPU_NODE]) == 2
    assert build_demand(ActorSettings(), [LAPTOP], num_gpus=2).gpus == 0
