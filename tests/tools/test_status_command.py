"""`logitstore status`: what it hears of captures, how it follows them, and that it disturbs none."""

from __future__ import annotations

import datetime
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up import build_records, put_shard
from rich.console import Console

from logitstore.errors import OutsideError
from logitstore.store.commit import (
    QuarantinedUnit,
    UnitListing,
    build_attempt,
    build_commit_path,
    commit_unit,
    quarantine_unit,
)
from logitstore.store.files import StoreFiles
from logitstore.store.manifest import write_manifest
from logitstore.store.plan import read_plan
from logitstore.store.running import HeardCapture, RunningCapture, build_running_path, delete_running, write_running
from tools import status_watch
from tools.status_view import describe_in_one_line
from tools.status_watch import watch_status
from tools.store_status import StatusReader, compute_pace, find_pace, read_status

HOUR = 3600.0


def say(files: StoreFiles, run: str = "a1", *, age: float = 0.0, **changes: Any) -> RunningCapture:
    """Leave a capture's word, as old as told."""
    now = datetime.datetime.now(datetime.UTC)
    values = {
        "run": run,
        "host": "node",
        "process": 7,
        "started_at": now,
        "written_at": now,
        "seconds_between": 15.0,
        "phase": "capturing",
        "actors_ready": 1,
        "actors_wanted": 2,
        "units_in_flight": (2, 3),
        "units_per_second": 0.5,
        "positions_per_second": 100.0,
    }
    word = RunningCapture.model_validate({**values, **changes})
    write_running(files, word)
    path = Path(files.url, build_running_path(run))
    os.utime(path, (time.time() - age, time.time() - age))
    return word


def commit(files: StoreFiles, unit: int, folder: Path) -> None:
    commit_unit(files, put_shard(files, read_plan(files), unit, build_records(20, unit=unit), build_attempt(), folder))


def test_status_counts_what_is_in_flight_at_captures_at_work(growing_store: StoreFiles, logitstore: Any) -> None:
    assert logitstore.json("status", growing_store.url)["units_in_flight"] is None
    say(growing_store)  # 2 is committed by now
    status = logitstore.json("status", growing_store.url)
    assert (status["units_in_flight"], status["units_left"]) == (1, 1)
    say(growing_store, "b2")
    assert logitstore.json("status", growing_store.url)["units_in_flight"] == 1  # both are at the same unit
    stdout, _ = logitstore("status", growing_store.url)
    assert "3 of 4 committed, 1 to do, 1 of them in flight" in stdout
    assert "200 positions/s, 3,600 units per hour, 1.0 s left" in stdout
    assert stdout.count("node:7") == 2
    assert "a capture is at work" in stdout


def test_capture_that_was_killed_is_told_by_its_silence(growing_store: StoreFiles, logitstore: Any) -> None:
    say(growing_store, age=600.0, failures=2, actor_losses=1, actor_hangs=1)
    status = logitstore.json("status", growing_store.url)
    [capture] = status["captures"]
    assert (capture["state"], status["units_in_flight"], capture["positions_per_second"]) == ("silent", None, None)
    assert capture["heard_seconds_ago"] == pytest.approx(600.0, abs=60.0)
    stdout, _ = logitstore("status", growing_store.url)
    assert "2 failures, 1 lost actor, 1 hanging actor, killed, most likely" in " ".join(stdout.split())
    assert "'logitstore capture CAPTURE.yaml' goes on with the rest\n" in stdout


def test_capture_that_ended_with_an_error_says_which(growing_store: StoreFiles, logitstore: Any) -> None:
    say(growing_store, phase="ended", error="OutsideError: bucket: 503\nmore", units_in_flight=())
    [capture] = logitstore.json("status", growing_store.url)["captures"]
    assert (capture["state"], capture["error"]) == ("ended", "OutsideError: bucket: 503\nmore")
    stdout, _ = logitstore("status", growing_store.url)
    assert "OutsideError: bucket: 503" in " ".join(stdout.split())


def test_store_that_is_whole_does_not_tell_of_captures_that_are_gone(
    growing_store: StoreFiles, tmp_path: Path, logitstore: Any
) -> None:
    commit(growing_store, 3, tmp_path)
    say(growing_store, age=HOUR)
    assert "node:7" not in logitstore("status", growing_store.url)[0]
    assert [one["state"] for one in logitstore.json("status", growing_store.url)["captures"]] == ["silent"]


def test_status_hears_captures_and_changes_nothing(growing_store: StoreFiles, logitstore: Any) -> None:
    say(growing_store)
    say(growing_store, "b2", age=HOUR)
    files = {path: path.stat().st_mtime_ns for path in Path(growing_store.url).rglob("*") if path.is_file()}
    logitstore("status", growing_store.url)
    assert {path: path.stat().st_mtime_ns for path in Path(growing_store.url).rglob("*") if path.is_file()} == files


def test_second_look_reads_only_commits_that_are_new(growing_store: StoreFiles, tmp_path: Path) -> None:
    reader = StatusReader(growing_store)
    assert reader.read().units_committed == 3
    for unit in range(3):  # nobody who reads them again would get by
        Path(growing_store.url, build_commit_path(unit)).write_bytes(b"damaged")
    commit(growing_store, 3, tmp_path)
    status = reader.read()
    assert (status.units_committed, status.is_complete, status.manifest, status.units_not_in_manifest) == (
        4,
        True,
        1,
        2,
    )


def test_second_look_sees_a_new_manifest(growing_store: StoreFiles) -> None:
    reader = StatusReader(growing_store)
    assert (reader.read().manifest, reader.read().units_not_in_manifest) == (1, 1)
    write_manifest(growing_store, read_plan(growing_store).compute_fingerprint())
    status = reader.read()
    assert (status.manifest, status.units_not_in_manifest, status.units_committed) == (2, 0, 3)


def test_watch_in_a_log_writes_a_line_for_every_look_and_all_of_it_at_the_end(
    growing_store: StoreFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say(growing_store, failures=2)
    acts: list[Callable[[], object]] = [
        lambda: commit(growing_store, 3, tmp_path),
        lambda: delete_running(growing_store, "a1"),
    ]
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        acts.pop(0)()

    watch_status(growing_store, seconds=7.0, pause=pause)
    lines = capsys.readouterr().out.split("\n")
    assert [line.partition(" ")[2] for line in lines[:3]] == [
        "3 of 4 committed, 1 to do, 1 of them in flight, 100 positions/s, 1,800 units per hour, 2.0 s left, "
        "1/2 actors, 1 dead letter, 2 failures",
        "4 of 4 committed, 1/2 actors, 1 dead letter, 2 failures",
        "4 of 4 committed, 1 dead letter",
    ]
    assert any("progress" in line for line in lines[3:7])  # the address of the store may take several lines
    assert (acts, pauses) == ([], [7.0, 7.0])


def test_watch_on_a_terminal_shows_the_store_in_place(
    growing_store: StoreFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(growing_store)
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    console = Console(file=screen, force_terminal=True, width=120, height=50, color_system=None)
    monkeypatch.setattr(status_watch, "open_console", lambda: console)
    quarantine_unit(growing_store, QuarantinedUnit(unit=3, attempts=3, error="TeacherError: NaN"))
    watch_status(growing_store, seconds=1.0, pause=lambda _: delete_running(growing_store, "a1"))
    shown = screen.getvalue()
    assert shown.count("3 of 4 committed, 1 set aside") >= 2
    assert "\x1b[1A" in shown  # the first picture was painted over
    assert "a capture is at work" in shown
    assert "--retry-quarantined" in shown.rpartition("progress")[2]


def test_watch_waits_for_storage_that_fails_and_not_at_the_first_look(
    growing_store: StoreFiles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quarantine_unit(growing_store, QuarantinedUnit(unit=3, attempts=3, error="TeacherError: NaN"))
    say(growing_store)
    listing = StoreFiles.list

    def fail(files: StoreFiles, folder: str) -> Any:
        raise OutsideError("bucket: 503")

    acts: list[Callable[[], object]] = [
        lambda: monkeypatch.setattr(StoreFiles, "list", fail),
        lambda: (monkeypatch.setattr(StoreFiles, "list", listing), delete_running(growing_store, "a1")),
    ]
    watch_status(growing_store, seconds=1.0, pause=lambda _: acts.pop(0)())
    assert "cannot be read at the moment: bucket: 503" in capsys.readouterr().err
    monkeypatch.setattr(StoreFiles, "list", fail)
    with pytest.raises(OutsideError, match="503"):
        watch_status(growing_store, seconds=1.0)


def test_watch_with_json_is_refused(growing_store: StoreFiles, logitstore: Any) -> None:
    stdout, stderr = logitstore("status", growing_store.url, "--watch", "--json", exit_code=2)
    assert stdout == ""
    assert "--json or --watch" in stderr


def test_line_of_a_store_whose_captures_are_gone_says_so(growing_store: StoreFiles) -> None:
    say(growing_store, age=HOUR)
    assert "no capture at work" in describe_in_one_line(read_status(growing_store))


@pytest.mark.parametrize(
    ("times", "units_per_hour"),
    [
        ([], None),
        ([0.0], None),
        ([0.0, 0.0], None),
        ([0.0, 60.0], 60.0),
        (np.linspace(0, 590, 60), 360.0),
        (np.arange(1000.0) * 30, 120.0),  # fifty where ten minutes have fewer
        (np.repeat(np.arange(1000.0), 100), 360_000.0),  # many within a second
        ([*np.arange(40.0), *(10_000 + 60 * np.arange(11.0))], 60.0),  # what was before a pause is not of late
    ],
)
def test_pace_is_that_of_the_newest_commits(times: Any, units_per_hour: float | None) -> None:
    times = np.asarray(times, np.float64)
    pace = compute_pace(times, float(times[-1]) + 100.0 if len(times) else 0.0)
    assert pace == (units_per_hour if units_per_hour is None else pytest.approx(units_per_hour, rel=0.002))


def test_pace_of_long_ago_is_not_told() -> None:
    assert compute_pace(np.arange(100.0), 99.0 + HOUR) is None


def test_pace_is_what_captures_at_work_say_and_else_what_the_commits_tell(growing_store: StoreFiles) -> None:
    times = np.arange(0.0, 600.0, 10.0)
    listing = UnitListing(units=np.arange(60), modified=times, bytes=np.ones(60))
    word = say(growing_store)
    heard = [HeardCapture(capture=word, heard=600.0)]
    assert find_pace(heard, listing, 6000, 600.0).units_per_hour == 1800.0
    told = find_pace([], listing, 6000, 700.0)
    assert (told.units_per_hour, told.positions_per_second) == (pytest.approx(360.0), pytest.approx(10.0))
    wordless = [HeardCapture(capture=word.model_copy(update={"units_per_second": None}), heard=600.0)]
    assert find_pace(wordless, listing, 6000, 600.0) == told


def test_store_whose_captures_are_gone_has_no_pace_until_somebody_else_commits(growing_store: StoreFiles) -> None:
    listing = UnitListing(units=np.arange(60), modified=np.arange(0.0, 600.0, 10.0), bytes=np.ones(60))
    word = say(growing_store)
    assert find_pace([HeardCapture(capture=word, heard=590.0)], listing, 6000, 700.0).units_per_hour is None
    others = find_pace([HeardCapture(capture=word, heard=500.0)], listing, 6000, 700.0)
    assert others.units_per_hour == pytest.approx(360.0)
