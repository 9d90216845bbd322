"""What a whole capture shows of itself to those who watch: in its store, and to Prometheus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from capture_processes import wait_until
from made_up_cluster import MadeUpCluster, build_made_up_cluster, raised_in_actor

from cluster import capture_watch
from cluster.driver import run_capture
from cluster.metrics import DriverMetrics
from logitstore.errors import OutsideError
from logitstore.store.files import StoreFiles
from logitstore.store.running import RUNNING, RunningCapture, read_running
from tools.store_status import read_status

NUM_UNITS = 24


@pytest.fixture
def made_up_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeUpCluster:
    """A capture with four actors whose word is said, and whose figures are shown, every time that there is one."""
    monkeypatch.setattr(capture_watch, "_SECONDS_BETWEEN_UPDATES", 0.0)
    made_up = build_made_up_cluster(tmp_path, monkeypatch, NUM_UNITS, actors={"count": 4})
    made_up.seconds = lambda actor, unit: 0.0 if unit is None else 1.0 + actor  # units end one by one
    made_up.settings = made_up.settings.model_copy(update={"heartbeat_seconds": 0.01})
    return made_up


def test_capture_at_work_is_heard_with_its_units_in_flight_and_not_when_it_has_ended(
    made_up_cluster: MadeUpCluster,
) -> None:
    files = StoreFiles(made_up_cluster.settings.store)
    words: list[RunningCapture] = []

    def listen(actor: int, unit: int) -> None:
        def is_new() -> bool:
            heard = read_running(files)
            return bool(heard) and (not words or heard[0].capture.written_at > words[-1].written_at)

        if len(words) < 6:
            wait_until(is_new, "a new word of the capture")
            words.append(read_running(files)[0].capture)

    made_up_cluster.answer_capture = listen
    run_capture(made_up_cluster.settings, quiet=True)
    assert len(words) == 6
    last = words[-1]
    assert (last.phase, last.actors_ready, last.actors_wanted) == ("capturing", 4, 4)
    assert last.units_in_flight
    assert all(set(word.units_in_flight) <= set(range(NUM_UNITS)) for word in words)
    assert files.list(RUNNING) == []
    assert read_status(files).is_over


def test_capture_that_ends_with_an_error_is_told_so_by_status(made_up_cluster: MadeUpCluster) -> None:
    made_up_cluster.answer_capture = lambda actor, unit: (
        raised_in_actor(OutsideError("bucket: 503")) if unit > 4 else None
    )
    with pytest.raises(OutsideError):
        run_capture(made_up_cluster.settings, quiet=True)
    status = read_status(StoreFiles(made_up_cluster.settings.store))
    [capture] = status.captures
    assert (capture.state, capture.error, capture.units_captured) == ("ended", "OutsideError: bucket: 503", 5)
    assert (status.units_committed, status.is_at_work, status.units_in_flight) == (5, False, None)


def test_capture_without_a_heartbeat_says_nothing(made_up_cluster: MadeUpCluster) -> None:
    made_up_cluster.answer_capture = lambda actor, unit: raised_in_actor(OutsideError("bucket: 503"))
    settings = made_up_cluster.settings.model_copy(update={"heartbeat_seconds": None})
    with pytest.raises(OutsideError):
        run_capture(settings, quiet=True)
    assert StoreFiles(settings.store).list(RUNNING) == []


def test_metrics_follow_the_figures_and_nothing_is_at_work_at_the_end(
    made_up_cluster: MadeUpCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[dict[str, float | None]] = []

    class Watched(DriverMetrics):
        def _set(self, metric: Any, value: float | None) -> None:
            super()._set(metric, value)
            if metric.name == "logitstore_units_planned":
                shown.append({})
            shown[-1][metric.name.removeprefix("logitstore_")] = value

    monkeypatch.setattr(capture_watch, "DriverMetrics", Watched)
    report = run_capture(made_up_cluster.settings, quiet=True)
    done = [values["units_done"] or 0 for values in shown]
    assert done == sorted(done)
    assert done[-1] == report.figures.units_done == NUM_UNITS
    assert max(values["units_in_flight"] or 0 for values in shown) > 1
    assert max(values["actors_ready"] or 0 for values in shown) == 4
    last = shown[-1]
    assert (last["units_in_flight"], last["actors_ready"], last["actors_wanted"], last["seconds_left"]) == (0, 0, 0, 0)
