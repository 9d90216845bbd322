"""Actors that hang, on a made-up cluster with a made-up clock."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from made_up_cluster import MadeUpCluster, build_made_up_cluster, raised_in_actor
from ray.exceptions import ActorDiedError

from cluster.driver import run_capture
from cluster.progress import describe_seconds
from cluster.settings import ClusterCaptureSettings
from cluster.unit_patience import FIRST_SECONDS, LEAST_SECONDS, TIMES_THE_SLOWEST, find_unit_limit
from logitstore.errors import TeacherLostError
from logitstore.settings import build_settings
from logitstore.store.commit import read_quarantine
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore

NUM_UNITS = 12
NEVER = 1e9


def build_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **actors: Any) -> MadeUpCluster:
    made_up = build_made_up_cluster(tmp_path, monkeypatch, NUM_UNITS, actors={"cpus": 4, **actors})
    made_up.seconds = lambda actor, unit: 5.0 if unit is None else 10.0
    return made_up


def hang_at(made_up: MadeUpCluster, unit: int, *, times: int = 1) -> None:
    """Whoever is sent this unit hangs, so often."""

    def find_seconds(actor: int, sent: int | None) -> float:
        if sent is None:
            return 5.0
        hangs = sent == unit and sum(other == unit for _, other in made_up.sent) <= times
        return NEVER if hangs else 10.0

    made_up.seconds = find_seconds


def list_captured(made_up: MadeUpCluster) -> list[int]:
    units: list[int] = LogitStore.open(made_up.settings.store).manifest.units.tolist()
    return units


def test_unit_of_an_actor_that_hangs_is_captured_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made_up = build_cluster(tmp_path, monkeypatch)
    hang_at(made_up, 7)
    with caplog.at_level(logging.WARNING, "logitstore.capture"):
        report = run_capture(made_up.settings, quiet=True)
    assert list_captured(made_up) == list(range(NUM_UNITS))
    assert (report.figures.actor_losses, report.figures.actor_hangs, report.figures.failures) == (1, 1, 0)
    assert LEAST_SECONDS <= made_up.now < LEAST_SECONDS + 120
    hung, instead = [actor for actor, unit in made_up.sent if unit == 7]
    assert hung != instead
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        f"the actor on node-{hung} has been at unit 7 for 5 min 0 s",
        f"the actor on node-{hung} hangs: it was at unit 7 for 10 min 0 s",
    ]


def test_slow_units_are_waited_for_ten_times_as_long_as_the_slowest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = build_cluster(tmp_path, monkeypatch)
    made_up.seconds = lambda actor, unit: 5.0 if unit is None else (2900.0 if unit == 9 else 300.0)
    assert run_capture(made_up.settings, quiet=True).figures.actor_losses == 0
    assert list_captured(made_up) == list(range(NUM_UNITS))


def test_first_units_have_hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = build_cluster(tmp_path, monkeypatch)
    made_up.seconds = lambda actor, unit: 5.0 if unit is None else (5 * 3600.0 if unit < 4 else 10.0)
    assert run_capture(made_up.settings, quiet=True).figures.actor_losses == 0
    assert list_captured(made_up) == list(range(NUM_UNITS))


def test_unit_that_every_actor_hangs_with_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = build_cluster(tmp_path, monkeypatch, unit_seconds=60)
    hang_at(made_up, 7, times=100)
    report = run_capture(made_up.settings, quiet=True)
    assert (report.quarantined_units, report.figures.actor_hangs) == ((7,), 6)
    [entry] = read_quarantine(StoreFiles(made_up.settings.store))
    assert (entry.attempts, entry.error) == (6, "its actor hangs every time, for 1 min 0 s last")
    assert Counter(unit for _, unit in made_up.sent)[7] == 6


def test_limit_that_is_switched_off_gives_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = build_cluster(tmp_path, monkeypatch, unit_seconds=None)
    made_up.seconds = lambda actor, unit: 5.0 if unit is None else (9000.0 if unit == 7 else 10.0)
    assert run_capture(made_up.settings, quiet=True).figures.actor_losses == 0
    assert list_captured(made_up) == list(range(NUM_UNITS))


def test_actor_that_hangs_on_a_machine_that_is_to_go_is_held_against_no_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its machine may stay until it is idle, which it never is; ten machines in a row."""
    made_up = build_cluster(tmp_path, monkeypatch, unit_seconds=60)
    hang_at(made_up, 7, times=10)
    monkeypatch.setattr(
        made_up, "read_draining", lambda: dict.fromkeys({f"n{actor}" for actor, unit in made_up.sent if unit == 7})
    )
    report = run_capture(made_up.settings, quiet=True)
    assert list_captured(made_up) == list(range(NUM_UNITS))
    assert report.figures.actor_hangs > 6
    assert report.quarantined_units == ()


def test_time_in_which_the_driver_stood_still_is_not_held_against_actors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = build_cluster(tmp_path, monkeypatch, unit_seconds=60)
    wait = made_up.wait

    def sleep_once(timeout: float) -> list[int]:
        if 30 <= made_up.now < 3600:
            made_up.now += 3600.0
            return []  # the word that calls have ended is still on its way
        return wait(timeout)

    monkeypatch.setattr(made_up, "wait", sleep_once)
    assert run_capture(made_up.settings, quiet=True).figures.actor_losses == 0
    assert list_captured(made_up) == list(range(NUM_UNITS))


def test_slow_group_has_a_limit_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [{"count": 1, "cpus": 4}, {"count": 1, "cpus": 2}]
    made_up = build_made_up_cluster(tmp_path, monkeypatch, NUM_UNITS, actors={"groups": groups})
    made_up.seconds = lambda actor, unit: 5.0 if unit is None else (100.0 if actor == 0 else 3000.0)
    assert run_capture(made_up.settings, quiet=True).figures.actor_losses == 0


def test_unit_that_is_captured_with_care_has_hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = build_cluster(tmp_path, monkeypatch)

    def answer(actor: int, unit: int) -> Exception | None:
        is_first = sum(other == 7 for other, _ in made_up.cares) == 1
        return raised_in_actor(TeacherLostError("engine: dead")) if unit == 7 and is_first else None

    made_up.answer_capture = answer
    made_up.seconds = lambda actor, unit: (
        5.0 if unit is None else 3600.0 if unit == 7 and [c for u, c in made_up.cares if u == 7][-1] else 10.0
    )
    report = run_capture(made_up.settings, quiet=True)
    assert (report.figures.actor_losses, report.figures.actor_hangs) == (1, 0)
    assert list_captured(made_up) == list(range(NUM_UNITS))


def test_actor_that_dies_while_it_hangs_is_lost_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = build_cluster(tmp_path, monkeypatch, unit_seconds=60)
    made_up.answer_capture = lambda actor, unit: (
        ActorDiedError() if unit == 7 and sum(other == 7 for _, other in made_up.sent) == 1 else None
    )
    made_up.seconds = lambda actor, unit: 5.0 if unit is None else 59.5
    report = run_capture(made_up.settings, quiet=True)
    assert (report.figures.actor_losses, report.figures.actor_hangs) == (1, 0)


@pytest.mark.parametrize(
    ("setting", "slowest", "with_care", "expected"),
    [
        ("auto", None, False, FIRST_SECONDS),
        ("auto", 1.0, False, LEAST_SECONDS),
        ("auto", 600.0, False, TIMES_THE_SLOWEST * 600),
        ("auto", 1.0, True, FIRST_SECONDS),
        ("auto", 3600.0, True, TIMES_THE_SLOWEST * 3600),
        (90.0, None, False, 90.0),
        (90.0, 1e6, True, 90.0),
        (None, 1.0, False, None),
    ],
)
def test_limit_of_a_unit(setting: Any, slowest: float | None, with_care: bool, expected: float | None) -> None:
    assert find_unit_limit(setting, slowest_seconds=slowest, with_care=with_care) == expected


def test_endpoints_have_no_limit_but_one_that_is_asked_for() -> None:
    def read_limit(**actors: Any) -> object:
        teacher = {
            "engine": "openai_api",
            "model": "m",
            "tokenizer": "t",
            "openai_api": {"url": "http://127.0.0.1:1/v1"},
        }
        values = {"store": "s", "corpus": {"files": ["a.txt"]}, "teacher": teacher, "actors": actors}
        return build_settings(ClusterCaptureSettings, values, where="test").actors.unit_seconds

    assert read_limit() is None
    assert read_limit(unit_seconds=60) == 60
    assert describe_seconds(FIRST_SECONDS) == "6 h 0 min"
