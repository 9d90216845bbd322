"""What captures at work say of themselves: heard, judged by their silence, and in nobody's way."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import pytest

from logitstore.store.files import StoreFiles
from logitstore.store.garbage import delete_garbage, find_garbage
from logitstore.store.logit_store import LogitStore
from logitstore.store.running import (
    RunningCapture,
    build_running_path,
    delete_running,
    read_running,
    write_running,
)
from logitstore.store.sealed_json import seal, unseal
from logitstore.store.verify import verify_store

THEN = datetime.datetime(2026, 11, 22, 12, 0, tzinfo=datetime.UTC)


def build_word(run: str = "a1", **changes: Any) -> RunningCapture:
    values = {
        "run": run,
        "host": "node-1",
        "process": 7,
        "started_at": THEN,
        "written_at": THEN,
        "seconds_between": 15.0,
        "phase": "capturing",
        "units_in_flight": (3, 5),
    }
    return RunningCapture.model_validate({**values, **changes})


@pytest.fixture
def files(tmp_path: Path) -> StoreFiles:
    return StoreFiles(str(tmp_path / "store"))


def set_age(files: StoreFiles, run: str, time: float) -> None:
    os.utime(Path(files.url, build_running_path(run)), (time, time))


def test_word_that_is_said_again_replaces_the_one_before(files: StoreFiles) -> None:
    write_running(files, build_word())
    write_running(files, build_word(positions=7))
    [heard] = read_running(files)
    assert heard.capture == build_word(positions=7)


@pytest.mark.parametrize("url", ["memory://running-test", "s3"])
@pytest.mark.slow
def test_words_are_heard_on_object_storage_with_the_times_that_it_gives(
    url: str, request: pytest.FixtureRequest
) -> None:
    files = StoreFiles(request.getfixturevalue("s3_url") if url == "s3" else url)
    write_running(files, build_word("a1"))
    write_running(files, build_word("b2", positions=1))
    write_running(files, build_word("a1", positions=2))
    heard = read_running(files)
    assert {entry.capture.run: entry.capture.positions for entry in heard} == {"a1": 2, "b2": 1}
    assert all(entry.heard > THEN.timestamp() for entry in heard)
    delete_running(files, "a1")
    delete_running(files, "b2")
    delete_running(files, "b2")
    assert read_running(files) == []


def test_word_heard_last_comes_first_and_silence_is_the_storages(files: StoreFiles) -> None:
    now = THEN.timestamp()
    for run, age in (("a1", 300.0), ("b2", 10.0), ("c3", 61.0)):
        write_running(files, build_word(run, written_at=THEN + datetime.timedelta(days=1)))
        set_age(files, run, now - age)
    heard = read_running(files)
    assert [(entry.capture.run, entry.compute_silence(now)) for entry in heard] == [("b2", 10), ("c3", 61), ("a1", 300)]
    assert [entry.is_at_work(now) for entry in heard] == [True, False, False]


def test_capture_that_speaks_seldom_is_given_four_times_as_long(files: StoreFiles) -> None:
    now = THEN.timestamp()
    write_running(files, build_word(seconds_between=100.0))
    set_age(files, "a1", now - 399.0)
    assert read_running(files)[0].is_at_work(now)
    assert not read_running(files)[0].is_at_work(now + 2)


def test_capture_that_has_ended_is_not_at_work(files: StoreFiles) -> None:
    write_running(files, build_word(phase="ended", error="OutsideError: 503"))
    [heard] = read_running(files)
    assert not heard.is_at_work(heard.heard)


def test_words_that_cannot_be_read_are_left_out(files: StoreFiles) -> None:
    write_running(files, build_word())
    word = unseal(Path(files.url, build_running_path("a1")).read_bytes())
    files.put(build_running_path("damaged"), seal(word).replace(b"node-1", b"node-2"))
    files.put(build_running_path("other"), b"no JSON")
    files.put(build_running_path("renamed"), seal(word))
    files.put(build_running_path("wordless"), seal(b'{"run":"wordless"}'))
    assert [heard.capture.run for heard in read_running(files)] == ["a1"]


def test_word_of_a_later_program_that_says_more_is_read(files: StoreFiles) -> None:
    word = build_word().model_dump_json().encode()
    files.put(build_running_path("a1"), seal(word.replace(b'{"format', b'{"weather":"fine","format', 1)))
    assert [heard.capture for heard in read_running(files)] == [build_word()]


def test_words_are_nothing_to_readers_and_garbage_a_day_after_the_last_one(small_store_url: str) -> None:
    files = StoreFiles(small_store_url)
    records = len(LogitStore.open(small_store_url, "live"))
    write_running(files, build_word())
    [heard] = read_running(files)
    assert len(LogitStore.open(small_store_url, "live")) == records
    assert verify_store(files).is_clean
    assert find_garbage(files, now=heard.heard + 3600) == []
    garbage = find_garbage(files, now=heard.heard + 25 * 3600)
    assert [item.path for item in garbage] == [build_running_path("a1")]
    delete_garbage(files, garbage)
    assert read_running(files) == []
    assert verify_store(files).is_clean
