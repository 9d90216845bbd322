"""How many actors of which kind a capture has, on machines that come and go."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.actor_groups import ActorGroup, build_groups, find_room, plan_counts
from cluster.placement import ActorDemand, Machine, count_rooms
from cluster.settings import ClusterCaptureSettings
from logitstore.errors import ConfigError
from logitstore.settings import build_settings

A100 = {"ray.io/accelerator-type": "A100"}


def build_machine(node_id: str, labels: dict[str, str] | None = None, **resources: float) -> Machine:
    return Machine(node_id=node_id, resources=resources, labels=labels or {})


def build_capture(actors: dict[str, Any], **teacher: Any) -> ClusterCaptureSettings:
    values = {
        "store": "memory://store",
        "corpus": {"files": ["a.txt"]},
        "teacher": {"model": "made-up", **teacher},
        "actors": actors,
    }
    return build_settings(ClusterCaptureSettings, values, where="test")


def find_counts(groups: list[ActorGroup], machines: list[Machine], most: int | None = None) -> list[int]:
    find_room(groups, machines)
    return plan_counts(groups, most)


def test_actors_without_a_count_follow_the_machines_that_join_and_stay_wanted_when_one_leaves() -> None:
    machines = [build_machine("a", CPU=4.0), build_machine("b", CPU=4.0)]
    groups = build_groups(build_capture({"cpus": 2}), machines[:1])
    assert find_counts(groups, machines[:1]) == [2]
    assert find_counts(groups, machines) == [4]
    assert find_counts(groups, machines[1:]) == [4]  # whoever replaces the lost machine finds demand


def test_actors_are_no_more_than_max_and_no_more_than_units() -> None:
    machines = [build_machine("a", CPU=64.0)]
    groups = build_groups(build_capture({"cpus": 2, "max": 10}), machines)
    assert find_counts(groups, machines) == [10]
    assert plan_counts(groups, 3) == [3]


def test_count_is_asked_for_whatever_machines_there_are() -> None:
    groups = build_groups(build_capture({"cpus": 2, "count": 10}), [])
    assert find_counts(groups, []) == [10]
    assert plan_counts(groups, 7) == [7]


def test_cluster_without_a_machine_is_asked_for_one_actor() -> None:
    groups = build_groups(build_capture({"gpus": 1}), [])
    assert find_counts(groups, []) == [1]


def test_actor_that_could_not_load_is_not_started_again() -> None:
    machines = [build_machine("a", CPU=4.0)]
    groups = build_groups(build_capture({"cpus": 2}), machines)
    groups[0].dropped = 1
    assert find_counts(groups, machines) == [1]
    groups[0].dropped = 2
    assert find_counts(groups, machines) == [0]


def test_groups_take_their_defaults_from_the_actors_and_machines_from_those_before_them() -> None:
    actors = {
        "cpus": 4,
        "groups": [
            {"gpus": 1, "labels": A100, "teacher": {"batch_tokens": 65536}},
            {"gpus": 1, "cpus": 2, "max": 3},
            {"gpus": 0},
        ],
    }
    machines = [build_machine("a", A100, CPU=16.0, GPU=2.0), build_machine("b", CPU=16.0, GPU=8.0)]
    groups = build_groups(build_capture(actors), machines)
    assert [group.demand for group in groups] == [
        ActorDemand(cpus=4, gpus=1, labels=A100),
        ActorDemand(cpus=2, gpus=1),
        ActorDemand(cpus=4, gpus=0),
    ]
    assert [group.settings.teacher.batch_tokens for group in groups] == [65536, 8192, 8192]
    # The first takes 8 CPUs of a, the second 6 of b; the third has the 8 and 10 that are left.
    assert find_counts(groups, machines) == [2, 3, 4]
    assert plan_counts(groups, 4) == [2, 2, 0]


@pytest.mark.parametrize(
    ("actors", "message"),
    [
        ({"count": 2, "max": 4}, r"expected count or max, found both \(2 and 4\)"),
        ({"count": 2, "groups": [{"gpus": 1}]}, "expected count and max in each of the 1 groups"),
        ({"resources": {"A100": 0}}, "expected amounts above 0"),
        ({"groups": [{"teacher": {"vllm": {}}}]}, "expected engine 'vllm' beside it"),
        ({"groups": [{"teacher": {"dtype": "float32"}}]}, "known keys: device, batch_tokens"),
    ],
)
def test_actors_that_contradict_themselves_are_refused(actors: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_capture(actors)


def test_fractions_of_gpus_fill_a_machine() -> None:
    demand = ActorDemand(cpus=1, gpus=0.1)
    assert demand.count_in({"CPU": 64.0, "GPU": 0.3}) == 3
    assert count_rooms([demand], [None], [build_machine("a", CPU=64.0, GPU=1.0)]) == [10]


PARALLEL = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}


def test_teacher_on_one_machine_asks_for_all_its_gpus_there() -> None:
    machines = [build_machine("a", CPU=8.0, GPU=2.0), build_machine("b", CPU=8.0, GPU=2.0)]
    groups = build_groups(build_capture({"cpus": 2}, engine="vllm", vllm=PARALLEL), machines)
    assert groups[0].demand == ActorDemand(cpus=2, gpus=4)
    assert find_counts(groups, machines) == [1]  # which waits: no machine has four


@pytest.mark.parametrize(
    ("machines", "count", "expected"),
    [
        ([{"CPU": 8.0, "GPU": 4.0}] * 3, None, 3),
        ([{"CPU": 8.0, "GPU": 2.0}] * 3, None, 1),
        ([{"CPU": 8.0, "GPU": 2.0}] * 8, 2, 2),
        ([{"CPU": 8.0, "GPU": 3.5}] * 2, None, 1),  # six whole GPUs, and two halves
        ([{"CPU": 8.0, "GPU": 0.5}] * 8, None, 0),
        ([{"CPU": 1.0, "GPU": 8.0}] * 2, None, 0),  # nowhere two CPUs for the first bundle
        ([{"CPU": 2.0, "GPU": 8.0}, {"GPU": 4.0}], None, 1),  # CPUs for one
        ([{"CPU": 2.0, "GPU": 1.0}, {"GPU": 1.0}, {"GPU": 2.0}], None, 1),
        ([{"CPU": 64.0}, {"GPU": 8.0}], None, 0),  # CPUs where there are no GPUs
        ([{"CPU": 4.0, "GPU": 4.0}, {"GPU": 4.0}], None, 1),  # Ray packs the first one on the machine with the CPUs
    ],
)
def test_rooms_for_teachers_across_machines_are_what_ray_can_place(
    machines: list[dict[str, float]], count: int | None, expected: int
) -> None:
    demand = ActorDemand(cpus=2, gpus=4, across_machines=True)
    found = [Machine(node_id=str(number), resources=resources) for number, resources in enumerate(machines)]
    assert count_rooms([demand], [count], found) == [expected]


def test_teachers_across_machines_leave_and_take_what_other_groups_have() -> None:
    across, single = ActorDemand(cpus=2, gpus=4, across_machines=True), ActorDemand(cpus=2, gpus=1)
    machines = [build_machine(name, CPU=8.0, GPU=3.0) for name in "ab"]
    assert count_rooms([across, single], [None, None], machines) == [1, 2]
    assert count_rooms([single, across], [2, None], machines) == [2, 1]
    assert count_rooms([single, across], [3, None], machines) == [3, 0]
    assert count_rooms([ActorDemand(cpus=2, gpus=4, labels=A100, across_machines=True)], [None], machines) == [0]


def test_teacher_across_machines_asks_for_a_bundle_for_each_gpu() -> None:
    machines = [build_machine("a", CPU=8.0, GPU=2.0), build_machine("b", CPU=8.0, GPU=2.0)]
    settings = build_capture({"cpus": 2}, engine="vllm", vllm={**PARALLEL, "across_machines": True})
    groups = build_groups(settings, machines)
    assert groups[0].demand == ActorDemand(cpus=2, gpus=4, across_machines=True)
    assert groups[0].demand.bundles == [{"CPU": 2.0, "GPU": 1.0}, *[{"GPU": 1.0}] * 3]
    assert find_counts(groups, machines) == [1]
    with pytest.raises(ConfigError, match=r"expected 4, .* found 1"):
        build_groups(build_capture({"gpus": 1}, engine="vllm", vllm={**PARALLEL, "across_machines": True}), machines)
