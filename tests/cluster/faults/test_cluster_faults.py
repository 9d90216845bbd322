"""Captures on a cluster of several machines, each with something that goes wrong: every document is recorded once."""

from __future__ import annotations

from pathlib import Path

import pytest
from capture_processes import wait_until
from fault_proxy import FaultProxy, Rule
from s3_server import BUCKET

from logitstore.store.commit import COMMITS, list_units, read_commit
from tests.cluster.faults.fault_captures import check_whole, finish, make_capture
from tests.cluster.faults.fault_cluster import FaultCluster
from tests.cluster.faults.hooks.planned_faults import Fault
from tools.gc import run_gc

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_actors_killed_at_every_step_of_a_unit_lose_and_repeat_nothing(cluster: FaultCluster, tmp_path: Path) -> None:
    capture = make_capture(tmp_path)
    cluster.faults.plan(
        Fault(place="scored", kind="kill", units=(3,)),
        Fault(place="stored", kind="kill", units=(9,)),
        Fault(place="committed", kind="kill", units=(15,)),
    )
    summary, _ = finish(cluster.start(capture))
    assert summary["run"]["failures"] == 0
    assert summary["run"]["actor_losses"] == 3
    killed = {event["place"]: event["attempt"] for event in cluster.faults.read_events("kill")}
    assert set(killed) == {"scored", "stored", "committed"}
    # Killed after its file was stored: garbage. Killed after its commit: nobody does it again.
    garbage = check_whole(capture)
    assert garbage == {f"data/0000009-{killed['stored']}.parquet"}
    assert read_commit(capture.files, 15).attempt == killed["committed"]
    assert {item.path for item in run_gc(capture.files, grace_hours=0, delete=True)} == garbage
    assert check_whole(capture) == set()
    cluster.check_nobody_works()


def test_actors_that_hang_in_the_middle_of_a_unit_are_given_up(cluster: FaultCluster, tmp_path: Path) -> None:
    """One in Python, one as a whole: not even its end, when it is asked for, would it hear."""
    capture = make_capture(tmp_path, actors={"count": 2, "cpus": 1, "unit_seconds": 10})
    cluster.faults.plan(
        Fault(place="scored", kind="wait", units=(5,)),
        Fault(place="stored", kind="freeze", units=(14,)),
    )
    summary, log = finish(cluster.start(capture))
    assert (summary["run"]["failures"], summary["run"]["actor_losses"]) == (0, 2)
    for unit in (5, 14):
        assert f"hangs: it was at unit {unit} for " in log
    [frozen] = cluster.faults.read_events("freeze")
    assert check_whole(capture) == {f"data/0000014-{frozen['attempt']}.parquet"}
    cluster.check_nobody_works()


def test_actors_without_room_on_disk_or_in_memory_cost_no_more_than_a_document(
    cluster: FaultCluster, tmp_path: Path
) -> None:
    capture = make_capture(tmp_path, num_documents=32, num_units=8, marked=frozenset({20}))
    cluster.faults.plan(
        Fault(place="spilling", kind="full_disk", times=3),
        Fault(place="scoring", kind="out_of_memory", sequences=12, times=None),
        Fault(place="scoring", kind="out_of_memory", token_id=capture.marker_id, times=None),
    )
    summary, log = finish(cluster.start(capture))
    struck = {kind: len(cluster.faults.read_events(kind)) for kind in ("full_disk", "out_of_memory")}
    assert struck["full_disk"] == 3
    assert struck["out_of_memory"] >= 10
    assert log.count("expected room for a shard until it is uploaded, found [Errno 27]") == 3
    assert (summary["run"]["failures"], summary["run"]["actor_losses"]) == (0, 0)
    assert check_whole(capture, dead=frozenset({20}), reason="out_of_memory") == set()
    cluster.check_nobody_works()


def test_machine_that_is_taken_away_and_one_that_joins_late_change_nothing(
    cluster: FaultCluster, tmp_path: Path
) -> None:
    capture = make_capture(tmp_path)
    lost, other = cluster.machines.nodes
    # Whoever is there from the start has to wait with the last units for the one who comes late.
    cluster.faults.plan(Fault(place="scored", kind="wait", units=(*range(16, 24),), times=None, nodes=(lost, other)))
    driver = cluster.start(capture)
    wait_until(lambda: capture.count_commits() >= 4 or driver.poll() is not None, "the first commits")
    cluster.machines.remove(lost)

    def is_other_waiting() -> bool:
        return any(event["node"] == other for event in cluster.faults.read_events("wait"))

    wait_until(lambda: is_other_waiting() or driver.poll() is not None, "the last units")
    late = cluster.machines.add(num_cpus=1)

    def find_late_commits() -> list[int]:
        return [event["unit"] for event in cluster.faults.read_events("won") if event["node"] == late]

    wait_until(lambda: bool(find_late_commits()) or driver.poll() is not None, "a commit by the machine that came late")
    cluster.faults.release()
    summary, _ = finish(driver)
    assert find_late_commits()
    assert summary["run"]["failures"] == 0
    assert summary["run"]["actor_losses"] >= 1
    assert len(check_whole(capture)) <= 1  # what the lost machine may have stored and not committed
    cluster.check_nobody_works()


def test_actor_that_ends_its_unit_after_others_were_given_it_is_one_too_late(
    cluster: FaultCluster, tmp_path: Path
) -> None:
    """A machine whose network is cut: told dead, while its actor goes on and reaches the storage."""
    capture = make_capture(tmp_path)
    cluster.faults.plan(Fault(place="stored", kind="wait", units=(5,)))
    driver = cluster.start(capture)
    wait_until(lambda: bool(cluster.faults.read_events("wait")), "an actor with its unit stored and not committed")
    [waiting] = cluster.faults.read_events("wait")
    cluster.stop(waiting["node"])
    wait_until(lambda: 5 in list_units(capture.files, COMMITS), "its unit to be captured elsewhere")
    cluster.faults.release()
    wait_until(lambda: bool(cluster.faults.read_events("lost")), "the word that it was too late")
    [late] = cluster.faults.read_events("lost")
    assert (late["unit"], late["attempt"], late["process"]) == (5, waiting["attempt"], waiting["process"])
    summary, _ = finish(driver)
    assert (summary["run"]["failures"], summary["run"]["actor_losses"]) == (0, 1)
    assert read_commit(capture.files, 5).attempt != waiting["attempt"]
    assert check_whole(capture) == set()
    cluster.machines.remove(waiting["node"])
    cluster.check_nobody_works()


def test_storage_that_fails_for_a_while_costs_nothing_but_time(
    cluster: FaultCluster, proxy: FaultProxy, tmp_path: Path
) -> None:
    options = {"endpoint_url": proxy.endpoint_url, "key": proxy.server.key, "secret": proxy.server.secret}
    capture = make_capture(tmp_path, url=f"s3://{BUCKET}/{tmp_path.name}", storage_options=options)
    driver = cluster.start(capture)
    wait_until(lambda: capture.count_commits() >= 3 or driver.poll() is not None, "the first commits")
    outage = Rule(fault="refuse")
    proxy.set(outage)
    wait_until(lambda: outage.hits >= 60 or driver.poll() is not None, "requests in vain")
    proxy.set(Rule(fault="lose_response", method="PUT", path="commits/", times=3))
    summary, log = finish(driver)
    assert "waits: OutsideError" in log
    assert (summary["run"]["failures"], summary["run"]["actor_losses"]) == (0, 0)
    check_whole(capture)
    cluster.check_nobody_works()
