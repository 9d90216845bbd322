"""The driver on machines that join, fail and are taken away, on a made-up cluster with a made-up clock."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from made_up_cluster import MadeUpActor, MadeUpCluster, build_made_up_cluster, raised_in_actor
from ray.exceptions import ActorDiedError

from cluster.actor_groups import ActorGroup
from cluster.draining import should_hand_back
from cluster.driver import run_capture
from cluster.placement import Machine
from cluster.report import CaptureReport
from logitstore.errors import TeacherError
from logitstore.store.commit import read_quarantine
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore

NUM_UNITS = 24


@pytest.fixture
def made_up_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeUpCluster:
    """A cluster whose units take ten seconds, on one machine with room for two actors; actor i runs on n<i>."""
    made_up = build_made_up_cluster(tmp_path, monkeypatch, NUM_UNITS, actors={"cpus": 4})
    made_up.seconds = lambda actor, unit: 5.0 if unit is None else 10.0
    return made_up


def capture_all(made_up: MadeUpCluster) -> CaptureReport:
    report = run_capture(made_up.settings, quiet=True)
    store = LogitStore.open(made_up.settings.store)
    assert store.manifest.units.tolist() == list(range(NUM_UNITS))
    assert read_quarantine(StoreFiles(store.url)) == []
    assert sorted(made_up.ended) == sorted(made_up.started)
    return report


def take_away(
    made_up: MadeUpCluster, monkeypatch: pytest.MonkeyPatch, machine: str, *, notice: float, deadline: float
) -> None:
    """Say at one point in time that a machine goes at another."""
    monkeypatch.setattr(
        made_up, "read_draining", lambda: {machine: deadline - made_up.now} if made_up.now >= notice else {}
    )


def test_machine_that_joins_late_gets_actors_and_does_its_share(
    made_up_cluster: MadeUpCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = [*made_up_cluster.machines, Machine(node_id="late", resources={"CPU": 16.0})]
    monkeypatch.setattr(
        made_up_cluster, "read_machines", lambda: late if made_up_cluster.now >= 30 else made_up_cluster.machines
    )
    capture_all(made_up_cluster)
    assert made_up_cluster.started == [0, 1, 2, 3, 4, 5]
    shares = [sum(actor == number for actor, _ in made_up_cluster.sent) for number in range(6)]
    assert min(shares) >= 2
    assert made_up_cluster.now < 100  # two actors alone would take 125 seconds


def test_more_actors_than_units_are_not_kept_once_the_plan_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = build_made_up_cluster(tmp_path, monkeypatch, NUM_UNITS, actors={"count": 1000})
    made_up.seconds = lambda actor, unit: (1.0 if actor < 3 else 10_000.0) if unit is None else 50.0
    sent_at_end: list[int] = []
    end = made_up.end
    monkeypatch.setattr(made_up, "end", lambda actor: (sent_at_end.append(len(made_up.sent)), end(actor)))
    capture_all(made_up)
    assert len(made_up.started) == 1000
    assert sent_at_end.count(0) == 1000 - NUM_UNITS


def test_no_more_actors_are_started_than_units_are_left_in_a_store(made_up_cluster: MadeUpCluster) -> None:
    capture_all(made_up_cluster)
    StoreFiles(made_up_cluster.settings.store).delete("commits/0000005.json")
    made_up_cluster.started.clear()
    made_up_cluster.ended.clear()
    capture_all(made_up_cluster)
    assert (made_up_cluster.started, made_up_cluster.sent[-1][1]) == ([0], 5)


def test_actors_are_released_while_the_last_units_run(
    made_up_cluster: MadeUpCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_cluster.seconds = lambda actor, unit: 1.0 if unit is None else (300.0 if unit == 23 else 10.0)
    ended_at: list[float] = []
    end = made_up_cluster.end
    monkeypatch.setattr(made_up_cluster, "end", lambda actor: (ended_at.append(made_up_cluster.now), end(actor)))
    capture_all(made_up_cluster)
    assert [at > 300 for at in ended_at] == [False, True]


def test_draining_machine_ends_its_unit_hands_the_others_back_and_is_replaced(
    made_up_cluster: MadeUpCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    take_away(made_up_cluster, monkeypatch, "n1", notice=30.0, deadline=150.0)
    with caplog.at_level(logging.WARNING, "logitstore.capture"):
        report = capture_all(made_up_cluster)
    assert made_up_cluster.started == [0, 1, 2]
    assert made_up_cluster.ended[0] == 1
    assert len(made_up_cluster.cancelled) == 1  # what had been sent ahead
    assert (report.figures.actor_losses, report.figures.failures, report.figures.lost_races) == (0, 0, 0)
    # The unit that was running was not sent to anybody else.
    assert len(made_up_cluster.sent) == NUM_UNITS + 1
    assert [record.getMessage().split(" in ")[0] for record in caplog.records] == ["node-1 will be taken away"]


def test_draining_machine_without_time_for_its_unit_hands_it_back_at_once(
    made_up_cluster: MadeUpCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_cluster.seconds = lambda actor, unit: 5.0 if unit is None else 100.0
    # Its second unit has begun at 105: 30 seconds are to go when 20 are left.
    take_away(made_up_cluster, monkeypatch, "n1", notice=175.0, deadline=195.0)
    report = capture_all(made_up_cluster)
    assert report.figures.actor_losses == 0
    assert made_up_cluster.ended[0] == 1
    assert len(made_up_cluster.cancelled) == 1
    assert len(made_up_cluster.sent) == NUM_UNITS + 2


def test_loss_of_an_actor_whose_machine_was_to_go_is_held_against_no_unit(
    made_up_cluster: MadeUpCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every machine is taken away in the middle of unit 7, ten times."""
    lost: list[int] = []

    def answer(actor: int, unit: int) -> Exception | None:
        if unit == 7 and len(lost) < 10:
            lost.append(actor)
            return ActorDiedError()
        return None

    made_up_cluster.answer_capture = answer
    monkeypatch.setattr(
        made_up_cluster,
        "read_draining",
        lambda: dict.fromkeys({f"n{actor}" for actor, unit in made_up_cluster.sent if unit == 7 and len(lost) < 10}),
    )
    report = capture_all(made_up_cluster)
    assert report.figures.actor_losses == 10


def test_units_go_to_later_groups_while_an_earlier_one_waits_for_its_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [{"count": 8, "resources": {"H100": 1}}, {"count": 2}]
    made_up = build_made_up_cluster(tmp_path, monkeypatch, NUM_UNITS, actors={"cpus": 2, "groups": groups})
    waiting: set[int] = set()
    start = made_up.start

    def start_and_note(number: int, group: ActorGroup) -> MadeUpActor:
        (waiting.add if group.number == 0 else waiting.discard)(number)
        return start(number, group)

    monkeypatch.setattr(made_up, "start", start_and_note)
    made_up.seconds = lambda actor, unit: 1e9 if actor in waiting else 10.0
    monkeypatch.setattr(made_up, "read_free", lambda: pytest.fail("nobody captures"))
    capture_all(made_up)
    StoreFiles(made_up.settings.store).delete("commits/0000005.json")
    made_up.started.clear()
    made_up.ended.clear()
    capture_all(made_up)
    assert len(made_up.started) == 2  # one of each group


def test_no_actor_is_started_in_vain_while_the_last_unit_runs(
    made_up_cluster: MadeUpCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that is taken away, and would be left in time."""
    made_up_cluster.seconds = lambda actor, unit: 1.0 if unit is None else (300.0 if unit == 23 else 10.0)
    take_away(made_up_cluster, monkeypatch, "n1", notice=150.0, deadline=1000.0)
    capture_all(made_up_cluster)
    assert made_up_cluster.sent[-1] == (1, 23)
    assert made_up_cluster.started == [0, 1]


def test_actors_that_could_not_load_over_time_end_a_capture_that_has_nobody_left(
    made_up_cluster: MadeUpCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two could not load; when the machine of the last one is taken away, nobody is to take its place."""
    made_up_cluster.seconds = lambda actor, unit: 1.0 if unit is None else 10.0
    made_up_cluster.answer_load = lambda actor: raised_in_actor(TeacherError("no weights")) if actor else None
    take_away(made_up_cluster, monkeypatch, "n0", notice=30.0, deadline=150.0)
    monkeypatch.setattr(made_up_cluster, "read_free", lambda: pytest.fail("nobody captures, and nobody says so"))
    with pytest.raises(TeacherError, match="no weights"):
        run_capture(made_up_cluster.settings, quiet=True)
    assert LogitStore.open(made_up_cluster.settings.store).manifest.units.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("seconds_left", "running", "typical", "expected"),
    [
        (None, 5.0, 10.0, False),  # it may stay until it is idle
        (100.0, 0.0, None, False),  # nobody knows: wait while there is time
        (2.0, 0.0, None, True),
        (30.0, 5.0, 10.0, False),
        (30.0, 5.0, 60.0, True),
        (30.0, 50.0, 60.0, False),
        (30.0, 80.0, 60.0, False),  # longer than usual: any moment now
        (2.0, 80.0, 60.0, True),
    ],
)
def test_unit_is_handed_back_when_its_end_is_not_to_be_expected_in_time(
    seconds_left: float | None, running: float, typical: float | None, expected: bool
) -> None:
    found = should_hand_back(seconds_left=seconds_left, running_seconds=running, typical_seconds=typical)
    assert found is expected
