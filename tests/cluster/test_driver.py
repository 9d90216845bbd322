"""The driver against a made-up cluster: actors whose every answer a test writes, and a clock that only waits move."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
from made_up import build_identity
from made_up_cluster import MadeUpCluster, build_made_up_cluster, raised_in_actor
from ray.exceptions import ActorDiedError, RayError, UnserializableException

from cluster.driver import run_capture
from cluster.placement import Machine
from logitstore.errors import (
    CaptureError,
    ConfigError,
    IncompatibleStoreError,
    OutsideError,
    StoreNotFoundError,
    TeacherError,
    TeacherLostError,
)
from logitstore.store.commit import COMMITS, list_units, read_quarantine
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import list_manifests, read_manifest

NUM_UNITS = 24


@pytest.fixture
def made_up_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeUpCluster:
    return build_made_up_cluster(tmp_path, monkeypatch, NUM_UNITS, actors={"count": 4})


def count_commits(made_up: MadeUpCluster) -> int:
    return len(list_units(StoreFiles(made_up.settings.store), COMMITS))


def check_all_is_captured(made_up: MadeUpCluster) -> None:
    store = LogitStore.open(made_up.settings.store)
    assert store.manifest.units.tolist() == list(range(NUM_UNITS))
    assert read_quarantine(StoreFiles(store.url)) == []
    assert sorted(made_up.ended) == sorted(made_up.started)


def test_capture_without_trouble_commits_every_unit_and_lets_every_actor_go(made_up_cluster: MadeUpCluster) -> None:
    report = run_capture(made_up_cluster.settings, quiet=True)
    check_all_is_captured(made_up_cluster)
    assert (report.figures.units_captured, report.figures.records) == (NUM_UNITS, 2 * NUM_UNITS)
    assert made_up_cluster.started == [0, 1, 2, 3]


def test_capture_with_nothing_to_do_starts_no_actor(made_up_cluster: MadeUpCluster) -> None:
    run_capture(made_up_cluster.settings, quiet=True)
    report = run_capture(made_up_cluster.settings, quiet=True)
    assert (report.figures.units_before, report.figures.units_captured) == (NUM_UNITS, 0)
    assert made_up_cluster.started == [0, 1, 2, 3]


def test_broken_actor_is_restarted_and_its_units_are_captured_by_others(made_up_cluster: MadeUpCluster) -> None:
    made_up_cluster.answer_capture = lambda actor, unit: (
        raised_in_actor(RuntimeError("CUDA error")) if actor == 0 else None
    )
    report = run_capture(made_up_cluster.settings, quiet=True)
    check_all_is_captured(made_up_cluster)
    assert report.figures.failures >= 2
    assert made_up_cluster.ended[0] == 0  # before the others, which end with the capture


def test_capture_in_which_every_unit_fails_ends_with_the_first_failure(made_up_cluster: MadeUpCluster) -> None:
    made_up_cluster.answer_capture = lambda actor, unit: raised_in_actor(OSError(28, f"no space for unit {unit}"))
    with pytest.raises(CaptureError, match=r"OSError: .*no space for unit 0"):
        run_capture(made_up_cluster.settings, quiet=True)
    assert read_quarantine(StoreFiles(made_up_cluster.settings.store)) == []


@pytest.mark.parametrize("kind", [ConfigError, StoreNotFoundError])
def test_actor_that_does_not_see_the_store_ends_the_capture(
    made_up_cluster: MadeUpCluster, kind: type[Exception]
) -> None:
    made_up_cluster.answer_capture = lambda actor, unit: raised_in_actor(kind("store: nothing there"))
    with pytest.raises(kind, match=r"nothing there\n  raised by the actor on 10.0.0.1: .* does not see"):
        run_capture(made_up_cluster.settings, quiet=True)
    assert read_quarantine(StoreFiles(made_up_cluster.settings.store)) == []


def test_actor_that_cannot_load_is_dropped_once_another_could(
    made_up_cluster: MadeUpCluster, caplog: pytest.LogCaptureFixture
) -> None:
    made_up_cluster.answer_load = lambda actor: raised_in_actor(KeyError("x")) if actor else None
    with caplog.at_level(logging.ERROR, "logitstore.capture"):
        run_capture(made_up_cluster.settings, quiet=True)
    check_all_is_captured(made_up_cluster)
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [
        f"an actor is dropped, {left} are left" for left in (3, 2, 1)
    ]


def test_first_actor_that_cannot_load_ends_the_capture_with_what_it_said(made_up_cluster: MadeUpCluster) -> None:
    made_up_cluster.answer_load = lambda actor: raised_in_actor(KeyError("x"))
    with pytest.raises(TeacherError, match=r"'made-up': .* found KeyError: 'x'(.|\n)*made up"):
        run_capture(made_up_cluster.settings, quiet=True)


def test_error_that_python_cannot_unpickle_is_one_of_a_living_actor(made_up_cluster: MadeUpCluster) -> None:
    text = "ray::CaptureActor (pid=1, ip=10.0.0.1)\n  File made up\nhub.HubError: gone\n"
    made_up_cluster.answer_load = lambda actor: UnserializableException(text)
    with pytest.raises(TeacherError, match=r"expected it to load on 10.0.0.1, found hub.HubError: gone(.|\n)*made up"):
        run_capture(made_up_cluster.settings, quiet=True)
    made_up_cluster.answer_load = lambda actor: None
    made_up_cluster.answer_capture = lambda actor, unit: UnserializableException(text)
    with pytest.raises(CaptureError, match=r"attempts failed; (.|\n)*HubError: gone"):
        run_capture(made_up_cluster.settings, quiet=True)


def test_actors_that_all_die_while_they_load_end_the_capture(made_up_cluster: MadeUpCluster) -> None:
    made_up_cluster.answer_load = lambda actor: ActorDiedError()
    with pytest.raises(OutsideError, match="died 4 times while it loaded"):
        run_capture(made_up_cluster.settings, quiet=True)


def test_actors_with_different_teachers_end_the_capture(made_up_cluster: MadeUpCluster) -> None:
    made_up_cluster.identity_of = lambda actor: build_identity(weights_fingerprint="ab"[actor % 2] * 8)
    with pytest.raises(IncompatibleStoreError, match="node-0 and node-1 loaded different teachers"):
        run_capture(made_up_cluster.settings, quiet=True)


def test_actor_lost_in_the_middle_costs_no_unit(made_up_cluster: MadeUpCluster) -> None:
    calls: list[int] = []

    def answer(actor: int, unit: int) -> Exception | None:
        calls.append(unit)
        return ActorDiedError() if len(calls) in (6, 12) else None

    made_up_cluster.answer_capture = answer
    report = run_capture(made_up_cluster.settings, quiet=True)
    check_all_is_captured(made_up_cluster)
    assert (report.figures.actor_losses, report.figures.failures) == (2, 0)


def test_document_that_engines_die_of_is_left_out_of_its_unit(made_up_cluster: MadeUpCluster) -> None:
    def answer(actor: int, unit: int) -> Exception | None:
        care = [care for other, care in made_up_cluster.cares if other == unit][-1]
        if unit != 7 or (care is not None and "bad" in care.left_out):
            return None
        error = TeacherLostError("engine: dead")
        error.document_id = None if care is None else "bad"
        return raised_in_actor(error)

    made_up_cluster.answer_capture = answer
    report = run_capture(made_up_cluster.settings, quiet=True)
    check_all_is_captured(made_up_cluster)
    assert (report.figures.actor_losses, report.figures.failures) == (3, 0)
    *before, last = [care for unit, care in made_up_cluster.cares if unit == 7]
    assert [care and dict(care.left_out) for care in before] == [None, {}, {}]
    assert last is not None
    assert [(name, why.reason) for name, why in last.left_out.items()] == [("bad", "engine_died")]
    assert len({actor for actor, unit in made_up_cluster.sent if unit == 7}) == 4  # each that has lost its engine goes


def test_unit_under_which_engines_die_of_another_document_each_time_is_set_aside(
    made_up_cluster: MadeUpCluster,
) -> None:
    def answer(actor: int, unit: int) -> Exception | None:
        error = TeacherLostError("engine: dead")
        error.document_id = str(len(made_up_cluster.cares))
        return raised_in_actor(error) if unit == 7 else None

    made_up_cluster.answer_capture = answer
    report = run_capture(made_up_cluster.settings, quiet=True)
    assert (report.quarantined_units, report.figures.actor_losses) == ((7,), 6)
    [entry] = read_quarantine(StoreFiles(made_up_cluster.settings.store))
    assert "engine dies every time: engine: dead" in entry.error


def test_storage_that_stays_broken_ends_the_capture_with_a_manifest_of_what_is_there(
    made_up_cluster: MadeUpCluster,
) -> None:
    made_up_cluster.answer_capture = lambda actor, unit: (
        raised_in_actor(OutsideError("bucket: 503")) if unit > 4 else None
    )
    with pytest.raises(OutsideError, match="bucket: 503"):
        run_capture(made_up_cluster.settings, quiet=True)
    assert LogitStore.open(made_up_cluster.settings.store).manifest.units.tolist() == [0, 1, 2, 3, 4]
    assert read_quarantine(StoreFiles(made_up_cluster.settings.store)) == []


def test_ray_that_breaks_is_outside_trouble_whatever_ending_the_actors_says(
    made_up_cluster: MadeUpCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: object, **__: object) -> None:
        raise RayError("the head is gone")

    wait = made_up_cluster.wait

    def break_later(timeout: float) -> list[int]:
        if count_commits(made_up_cluster) >= 8:
            break_down()
        return wait(timeout)

    monkeypatch.setattr(made_up_cluster, "wait", break_later)
    with pytest.raises(OutsideError, match="RayError: the head is gone"):
        run_capture(made_up_cluster.settings, quiet=True)
    assert len(LogitStore.open(made_up_cluster.settings.store).manifest.units) >= 8


def test_capture_that_nobody_is_ready_for_says_so_every_30_seconds(
    made_up_cluster: MadeUpCluster, caplog: pytest.LogCaptureFixture
) -> None:
    made_up_cluster.ends = lambda now: now > 100
    with caplog.at_level(logging.WARNING, "logitstore.capture"):
        run_capture(made_up_cluster.settings, quiet=True)
    assert [record.getMessage() for record in caplog.records] == [
        "no actor is ready yet; each asks for 2 CPUs, 0 GPUs, the cluster has 1 × (8 CPUs, 0 GPUs), of which 1 CPUs, "
        "0 GPUs are free"
    ] * 3


def test_unit_set_aside_earlier_is_tried_again_when_asked_for(made_up_cluster: MadeUpCluster) -> None:
    made_up_cluster.answer_capture = lambda actor, unit: (
        raised_in_actor(TeacherError("nan")) if unit in (3, 7) else None
    )
    assert run_capture(made_up_cluster.settings, quiet=True).quarantined_units == (3, 7)
    files = StoreFiles(made_up_cluster.settings.store)
    assert [(entry.unit, entry.attempts) for entry in read_quarantine(files)] == [(3, 3), (7, 3)]

    made_up_cluster.answer_capture = lambda actor, unit: raised_in_actor(TeacherError("inf")) if unit == 7 else None
    report = run_capture(made_up_cluster.settings, retry_quarantined=True, quiet=True)
    assert (report.quarantined_units, report.figures.units_captured) == ((7,), 1)
    assert [(entry.unit, entry.error.split("\n")[0]) for entry in read_quarantine(files)] == [(7, "TeacherError: inf")]


def test_actor_that_no_machine_here_can_hold_is_refused_before_any_is_started(
    made_up_cluster: MadeUpCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_cluster.machines = [Machine(node_id="n0", resources={"CPU": 2.0, "logitstore_private": 1.0})]
    settings = made_up_cluster.settings.model_copy(
        update={"actors": made_up_cluster.settings.actors.model_copy(update={"cpus": 64.0})}
    )
    with pytest.raises(ConfigError, match="64 CPUs"):
        run_capture(settings, quiet=True)
    assert made_up_cluster.started == []


class AtOnce:
    """A pool that does its work when it is asked to."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, work: Callable[[], None]) -> Future[None]:
        work()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def shutdown(self) -> None:
        pass


def test_long_capture_writes_manifests_while_it_runs(
    made_up_cluster: MadeUpCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.manifests.MIN_NEW_UNITS", 5)
    monkeypatch.setattr("cluster.manifests.ThreadPoolExecutor", AtOnce)
    report = run_capture(made_up_cluster.settings, quiet=True)
    files = StoreFiles(made_up_cluster.settings.store)
    sizes = [len(read_manifest(files, number).units) for number in list_manifests(files)]
    assert len(sizes) > 2
    assert sizes == sorted(set(sizes))
    assert (sizes[-1], report.manifest_number) == (NUM_UNITS, len(sizes))


def test_manifest_that_cannot_be_written_while_a_capture_runs_does_not_stop_it(
    made_up_cluster: MadeUpCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OutsideError("the storage sleeps")

    monkeypatch.setattr("cluster.manifests.MIN_NEW_UNITS", 5)
    monkeypatch.setattr("cluster.manifests.write_manifest", fail)
    assert run_capture(made_up_cluster.settings, quiet=True).manifest_number == 1
    assert "no manifest was written while the capture runs: the storage sleeps" in caplog.text
