"""Captures on machines that join and are drained, on a real cluster; and what Ray is asked for by the actors' layer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from capture_processes import PATIENCE_SECONDS, wait_until
from tiny_models import save_model

from tests.cluster.faults import actor_layer
from tests.cluster.faults.fault_captures import check_whole, finish, make_capture
from tests.cluster.faults.fault_cluster import FaultCluster
from tests.cluster.faults.hooks.planned_faults import Fault

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ELASTIC = {"cpus": 1}


def drain(cluster: FaultCluster, node: str, seconds: int) -> None:
    """Tell Ray that a machine will be taken away."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.machines.address]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
    subprocess.run(
        [*command, "--node-id", node, *reason, "--deadline-remaining-seconds", str(seconds)],
        env=cluster.processes.environment,
        check=True,
        capture_output=True,
        timeout=PATIENCE_SECONDS,
    )


def test_machines_that_are_drained_end_their_units_or_hand_them_back_and_one_that_joins_takes_over(
    cluster: FaultCluster, tmp_path: Path
) -> None:
    capture = make_capture(tmp_path, actors=ELASTIC)
    cluster.faults.plan(Fault(place="scored", kind="wait", times=2))
    log = tmp_path / "log"
    driver = cluster.start(capture, log=log)

    def find_events(what: str, **facts: Any) -> list[dict[str, Any]]:
        assert driver.poll() is None, log.read_text()
        return [event for event in cluster.faults.read_events(what) if facts.items() <= event.items()]

    # An actor on either machine, both in the middle of a unit.
    wait_until(lambda: len(find_events("wait")) == 2, "two actors at work")
    slow, hasty = find_events("wait")
    drain(cluster, slow["node"], 600)
    wait_until(lambda: "will be taken away in" in log.read_text(), "the driver to hear of it")
    late = cluster.machines.add(num_cpus=1)
    wait_until(lambda: bool(find_events("won", node=late)), "a commit by the machine that came late")
    drain(cluster, hasty["node"], 4)
    wait_until(lambda: bool(find_events("won", unit=hasty["unit"], node=late)), "the unit that was handed back")
    cluster.faults.release()
    summary, _ = finish(driver)
    run = summary["run"]
    assert (run["failures"], run["actor_losses"]) == (0, 0), log.read_text()
    won = {event["unit"]: event["node"] for event in cluster.faults.read_events("won")}
    assert won[slow["unit"]] == slow["node"]
    assert won[hasty["unit"]] == late
    # What had been sent ahead went back.
    assert [list(won.values()).count(node) for node in (slow["node"], hasty["node"])] == [1, 0]
    assert check_whole(capture) == set()
    cluster.check_nobody_works()
    for node in (slow["node"], hasty["node"]):
        cluster.machines.remove(node)


def test_teacher_that_is_another_on_a_machine_that_joins_late_is_refused(cluster: FaultCluster, tmp_path: Path) -> None:
    cluster.prepare(num_machines=1)
    capture = make_capture(tmp_path, actors=ELASTIC)
    cluster.faults.plan(Fault(place="scored", kind="wait", units=(0,)))
    driver = cluster.start(capture)
    wait_until(lambda: bool(cluster.faults.read_events("wait")) or driver.poll() is not None, "an actor at work")
    save_model("llama", capture.teacher, seed=1)
    cluster.machines.add(num_cpus=1)
    output, errors = driver.communicate(timeout=PATIENCE_SECONDS)
    assert (driver.returncode, output) == (3, ""), errors
    assert "loaded different teachers" in errors
    assert "weights_fingerprint" in errors
    cluster.check_nobody_works()


def test_actor_across_machines_is_placed_in_a_group_that_is_freed_and_errors_of_all_kinds_come_back(
    cluster: FaultCluster, tmp_path: Path
) -> None:
    nodes = [cluster.machines.add(num_cpus=1, num_gpus=1) for _ in range(2)]
    capture = make_capture(tmp_path)
    done = subprocess.run(
        [sys.executable, actor_layer.__file__, cluster.machines.address, str(capture.settings)],
        env=cluster.processes.environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["machines_of_group"] == sorted(nodes)
    assert found["free_gpus"] == [2.0, 0.0, 2.0]  # before, meanwhile, after
    assert found["group"] == ["CREATED", "REMOVED"]
    assert found["errors"] == ["TeacherError", "UnserializableException", "ActorDiedError", None]
    for node in nodes:
        cluster.machines.remove(node)
