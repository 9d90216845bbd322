"""Actors that cannot load, for good or for a while, on a made-up cluster with a made-up clock."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from made_up_cluster import MadeUpCluster, build_made_up_cluster, raised_in_actor

from cluster.driver import run_capture
from cluster.load_ends import PATIENCE_SECONDS
from logitstore.errors import ConfigError, OutsideError
from logitstore.store.logit_store import LogitStore

NUM_UNITS = 24


@pytest.fixture
def made_up_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeUpCluster:
    """A cluster with room for two actors, whose loads take five seconds and whose units take ten."""
    made_up = build_made_up_cluster(tmp_path, monkeypatch, NUM_UNITS, actors={"cpus": 4})
    made_up.seconds = lambda actor, unit: 5.0 if unit is None else 10.0
    return made_up


def break_hub(made_up: MadeUpCluster, *, start: float = 0.0, stop: float, spared: int | None = None) -> None:
    made_up.answer_load = lambda actor: (
        raised_in_actor(OutsideError("hub: 503")) if start <= made_up.now < stop and actor != spared else None
    )


def check_all_is_captured(made_up: MadeUpCluster) -> None:
    assert LogitStore.open(made_up.settings.store).manifest.units.tolist() == list(range(NUM_UNITS))
    assert sorted(made_up.ended) == sorted(made_up.started)


def test_hub_that_is_down_for_a_minute_loses_no_actor(
    made_up_cluster: MadeUpCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    break_hub(made_up_cluster, stop=60.0)
    monkeypatch.setattr(made_up_cluster, "read_free", lambda: pytest.fail("there is room, and that is not the trouble"))
    with caplog.at_level(logging.WARNING, "logitstore.capture"):
        run_capture(made_up_cluster.settings, quiet=True)
    check_all_is_captured(made_up_cluster)
    assert {actor for actor, _ in made_up_cluster.sent} == {0, 1}
    waits = [record.getMessage() for record in caplog.records]
    assert waits[::2] == [
        f"the actor on 10.0.0.1 cannot load yet, and tries again in {seconds} s: hub: 503"
        for seconds in (2, 4, 8, 16, 32)
    ]
    assert made_up_cluster.now < 240


def test_actor_tries_to_load_as_long_as_another_captures(made_up_cluster: MadeUpCluster) -> None:
    made_up_cluster.seconds = lambda actor, unit: 5.0 if unit is None else 100.0
    break_hub(made_up_cluster, stop=2 * PATIENCE_SECONDS, spared=0)
    run_capture(made_up_cluster.settings, quiet=True)
    check_all_is_captured(made_up_cluster)
    assert {actor for actor, _ in made_up_cluster.sent} == {0, 1}
    tries = made_up_cluster.started.count(1)
    assert 20 < tries < 30  # after 2, 4, 8 … 60 seconds


def test_hub_that_stays_down_ends_the_capture_with_what_it_said(made_up_cluster: MadeUpCluster) -> None:
    break_hub(made_up_cluster, stop=1e9)
    with pytest.raises(OutsideError, match="hub: 503"):
        run_capture(made_up_cluster.settings, quiet=True)
    assert PATIENCE_SECONDS <= made_up_cluster.now < PATIENCE_SECONDS + 120
    assert sorted(made_up_cluster.ended) == sorted(made_up_cluster.started)


def test_time_in_which_others_captured_is_no_part_of_the_patience(
    made_up_cluster: MadeUpCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cannot load for an hour; then the other's machine goes, and a hub that is back ten minutes later will do."""
    made_up_cluster.seconds = lambda actor, unit: 5.0 if unit is None else 1000.0
    break_hub(made_up_cluster, stop=4100.0, spared=0)
    monkeypatch.setattr(
        made_up_cluster,
        "read_draining",
        lambda: {"n0": 4600.0 - made_up_cluster.now} if made_up_cluster.now > 3600 else {},
    )
    monkeypatch.setattr(made_up_cluster, "machine_of", lambda actor: f"n{actor}")
    run_capture(made_up_cluster.settings, quiet=True)
    check_all_is_captured(made_up_cluster)


def test_settings_that_do_not_fit_end_the_capture_at_once(made_up_cluster: MadeUpCluster) -> None:
    made_up_cluster.answer_load = lambda actor: raised_in_actor(ConfigError("teacher.device: no CUDA"))
    with pytest.raises(ConfigError, match="no CUDA"):
        run_capture(made_up_cluster.settings, quiet=True)
    assert made_up_cluster.now < 10
