"""The driver's word in its store: said while it works, taken back when it ends well, left when it cannot."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from capture_processes import wait_until
from made_up import build_plan

from cluster.figures import CaptureFigures
from cluster.heartbeat import Heartbeat
from logitstore.errors import OutsideError
from logitstore.store.files import StoreFiles
from logitstore.store.plan import create_plan
from logitstore.store.running import RUNNING, RunningCapture, read_running, write_running


@pytest.fixture
def files(tmp_path: Path) -> StoreFiles:
    files = StoreFiles(str(tmp_path / "store"))
    create_plan(files, build_plan(3))
    return files


def read_word(files: StoreFiles) -> RunningCapture | None:
    heard = read_running(files)
    assert len(heard) <= 1
    return heard[0].capture if heard else None


def wait_for_units(files: StoreFiles, heartbeat: Heartbeat, units: list[int]) -> RunningCapture:
    """The first word that names these units."""

    def has_said_so() -> bool:
        heartbeat.update(units)
        word = read_word(files)
        return word is not None and word.units_in_flight == tuple(sorted(units))

    wait_until(has_said_so, "a word of the capture")
    word = read_word(files)
    assert word is not None
    return word


def test_capture_says_what_it_is_at_until_it_has_ended_well(files: StoreFiles) -> None:
    figures = CaptureFigures(actors_ready=1, actors_wanted=2, failures=3)
    with Heartbeat(files, figures, seconds_between=0.01) as heartbeat:
        first = wait_for_units(files, heartbeat, [2, 0])
        assert (first.phase, first.actors_ready, first.actors_wanted, first.failures) == ("loading", 1, 2, 3)
        assert (first.units_per_second, first.error) == (None, None)
        figures.phase = "capturing"
        second = wait_for_units(files, heartbeat, [1])
        assert (second.run, second.started_at) == (first.run, first.started_at)
        assert second.phase == "capturing"
        assert second.written_at > first.written_at
    assert read_word(files) is None


def test_capture_that_ends_with_an_error_leaves_it_without_secrets(files: StoreFiles) -> None:
    figures = CaptureFigures(units_captured=2)
    heartbeat = Heartbeat(files, figures, seconds_between=100.0)
    heartbeat.update([1])
    with pytest.raises(OutsideError), heartbeat:
        raise OutsideError("https://me:secret@host/bucket: 503")
    word = read_word(files)
    assert word is not None
    assert (word.phase, word.units_captured, word.units_in_flight) == ("ended", 2, ())
    assert word.error == "OutsideError: https://***@host/bucket: 503"


@pytest.mark.parametrize(
    ("error", "said"), [(KeyboardInterrupt(), "interrupted"), (SystemExit(15), "stopped by signal 15")]
)
def test_interrupted_capture_says_so(files: StoreFiles, error: BaseException, said: str) -> None:
    with pytest.raises(type(error)), Heartbeat(files, CaptureFigures(), seconds_between=100.0):
        raise error
    word = read_word(files)
    assert word is not None
    assert (word.phase, word.error) == ("ended", said)


def test_next_capture_takes_back_the_words_of_those_not_at_work(files: StoreFiles) -> None:
    with pytest.raises(KeyboardInterrupt), Heartbeat(files, CaptureFigures(), seconds_between=100.0):
        raise KeyboardInterrupt
    [ended] = read_running(files)
    living = ended.capture.model_copy(update={"run": "living", "phase": "capturing", "error": None})
    write_running(files, living)
    with Heartbeat(files, CaptureFigures(), seconds_between=0.01):
        known = {"living", ended.capture.run}
        wait_until(lambda: bool({heard.capture.run for heard in read_running(files)} - known), "the new word")
        assert ended.capture.run not in {heard.capture.run for heard in read_running(files)}
    assert [heard.capture for heard in read_running(files)] == [living]


def test_capture_that_ends_well_takes_back_what_a_killed_one_left(files: StoreFiles) -> None:
    with pytest.raises(KeyboardInterrupt), Heartbeat(files, CaptureFigures(), seconds_between=100.0):
        raise KeyboardInterrupt
    with Heartbeat(files, CaptureFigures(), seconds_between=100.0):
        assert len(read_running(files)) == 1
    assert read_running(files) == []


def test_nothing_is_written_where_there_is_no_store_yet(tmp_path: Path) -> None:
    files = StoreFiles(str(tmp_path / "nothing"))
    asked = []

    class Asked(StoreFiles):
        def exists(self, path: str) -> bool:
            asked.append(path)
            return super().exists(path)

    with Heartbeat(Asked(files.url), CaptureFigures(), seconds_between=0.01):
        wait_until(lambda: len(asked) > 2, "the heartbeat to look for the store")
    with pytest.raises(KeyboardInterrupt), Heartbeat(files, CaptureFigures(), seconds_between=100.0):
        raise KeyboardInterrupt
    assert not Path(files.url).exists()


def test_capture_without_a_heartbeat_writes_nothing(files: StoreFiles) -> None:
    with pytest.raises(KeyboardInterrupt), Heartbeat(files, CaptureFigures(), seconds_between=None):
        raise KeyboardInterrupt
    assert files.list(RUNNING) == []


@pytest.mark.parametrize("error", [OutsideError("bucket: 503"), TypeError("bucket: 503")])  # of a client, too
def test_storage_that_fails_costs_one_warning_and_no_capture(
    files: StoreFiles, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    tried = []

    class Failing(StoreFiles):
        def put(self, path: str, data: bytes) -> None:
            tried.append(path)
            raise error

    with caplog.at_level(logging.DEBUG, "logitstore.capture"):
        with Heartbeat(Failing(files.url), CaptureFigures(), seconds_between=0.01):
            wait_until(lambda: len(tried) > 2, "several words")
        with pytest.raises(KeyboardInterrupt), Heartbeat(Failing(files.url), CaptureFigures(), seconds_between=100.0):
            raise KeyboardInterrupt
    assert [record.levelno for record in caplog.records].count(logging.WARNING) == 1
    assert caplog.records[0].getMessage() == "'logitstore status' does not hear of this capture: bucket: 503"
