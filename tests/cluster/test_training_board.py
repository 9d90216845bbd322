"""What the board of a training job tells its driver and its processes."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from cluster.training_board import TrainingBoard
from cluster.training_watch import SharedFolder
from cluster.worker_demand import WorkerDemand, build_worker_demand, check_room
from logitstore.errors import ConfigError, OutsideError

PRIVATE = {"logitstore_private": 1.0}


@pytest.fixture
def board() -> TrainingBoard:
    board = TrainingBoard(tries=3)
    board.leave("one", "task of one", ["a", "b"])
    board.leave("other", "task of other", ["c"])
    return board


def test_part_that_begins_is_told_its_task_and_what_earlier_processes_noted(board: TrainingBoard) -> None:
    assert board.read_task("other") == "task of other"
    assert board.begin("one", 0).notes == {}
    board.note("a", {"status": "running", "steps": 0})
    board.note("c", {"steps": 9})
    board.note("a", {"steps": 4})
    welcome = board.begin("one", 4)
    assert (welcome.order, welcome.given_up) == ("go on", None)
    assert welcome.notes == {"a": {"status": "running", "steps": 4}}


def test_driver_hears_every_note_once_and_merged(board: TrainingBoard) -> None:
    board.note("a", {"steps": 1, "status": "running"})
    board.note("a", {"steps": 2})
    assert board.take_news().notes == {"a": {"steps": 2, "status": "running"}}
    board.note("b", {"steps": 1})
    assert board.take_news().notes == {"b": {"steps": 1}}
    assert board.take_news().notes == {}


def test_part_that_begins_at_one_step_too_often_is_given_up_with_its_last_trouble(board: TrainingBoard) -> None:
    for step in (0, 0, 10, 10, 10):
        assert board.begin("one", step).order == "go on"
    board.report_trouble("one", "out of memory")
    board.take_news()
    welcome = board.begin("one", 10)
    assert board.take_news().beginnings == ["one: begins again at step 10; out of memory"]
    assert welcome.order == "stop"
    assert welcome.given_up == "lost 3 times at step 10: out of memory"
    assert board.begin("other", 10).order == "go on"
    assert board.read_order("other") == "go on"


def test_part_that_comes_further_each_time_is_never_given_up(board: TrainingBoard) -> None:
    assert {board.begin("one", step).order for step in range(50)} == {"go on"}


def test_parts_on_machines_that_will_go_are_told_once_to_move_and_have_not_failed(board: TrainingBoard) -> None:
    for _ in range(10):
        board.begin("one", 5)
        board.come("one", "x")
        board.come("one", "y")
        board.come("other", "z")
        assert board.move_from(["y", "w"]) == ["one"]
        assert board.move_from(["y", "w"]) == []
        assert (board.read_order("one"), board.read_order("other")) == ("move", "go on")
    assert board.begin("one", 5).order == "go on"
    assert board.move_from(["y"]) == []  # nobody has said yet where it runs now


def test_error_stops_all_parts_and_the_first_one_reaches_the_driver(board: TrainingBoard) -> None:
    assert board.fail("one", 1, ConfigError("wrong")) == 1
    assert board.fail("one", 1, ConfigError("again")) == 1
    assert board.fail("one", 0, OutsideError("late")) == 2
    assert board.count_failed("one") == 2
    assert board.read_order("other") == "stop"
    assert board.begin("other", 0).order == "stop"
    assert str(board.take_news().error) == "wrong"


def test_stop_goes_before_moving(board: TrainingBoard) -> None:
    board.begin("one", 0)
    board.come("one", "x")
    board.move_from(["x"])
    board.ask_stop()
    assert board.read_order("one") == "stop"
    assert board.take_news().error is None


def test_job_that_is_stopped_is_quiet_when_no_process_has_asked_for_a_while() -> None:
    seconds = 0.0
    board = TrainingBoard(tries=3, clock=lambda: seconds)
    board.leave("one", None, ["a"])
    board.begin("one", 0)
    seconds = 100.0
    assert not board.is_quiet()
    board.ask_stop()
    seconds = 110.0
    assert not board.is_quiet()
    assert board.read_order("one") == "stop"
    seconds = 120.0
    board.ask_stop()
    assert not board.is_quiet()
    seconds = 126.0
    assert board.is_quiet()


def test_process_that_does_not_see_the_output_folder_is_refused_with_both_machines(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "first"
    with SharedFolder(folder) as shared:
        shared.check_is_seen()
        elsewhere: SharedFolder = pickle.loads(pickle.dumps(shared))
        elsewhere.check_is_seen()
        [marker] = folder.iterdir()
        marker.unlink()
        with pytest.raises(ConfigError, match=rf"all machines of the cluster share, found {folder} on .* and another"):
            elsewhere.check_is_seen()
        folder.rmdir()
        with pytest.raises(ConfigError, match="shared file system"):
            elsewhere.check_is_seen()
    with pytest.raises(OutsideError, match="folder to write to"), SharedFolder(Path("/proc/nowhere")):
        pass


@pytest.mark.parametrize(
    ("nodes", "asked", "expected"),
    [
        ([{"CPU": 8.0}], (None, None), (1.0, 0.0)),
        ([{"CPU": 8.0}, {"CPU": 8.0, "GPU": 4.0}], (None, None), (1.0, 1.0)),
        ([{"CPU": 8.0, "GPU": 4.0}], (3.0, 0.0), (3.0, 0.0)),
    ],
)
def test_worker_asks_for_a_gpu_where_there_are_any(
    nodes: list[dict[str, float]], asked: tuple[float | None, float | None], expected: tuple[float, float]
) -> None:
    demand = build_worker_demand(nodes, *asked)
    assert (demand.cpus, demand.gpus) == expected


def test_workers_without_room_are_refused_where_no_machine_can_join() -> None:
    demand = WorkerDemand(cpus=2.0, gpus=0.0)
    check_room([{"CPU": 4.0, **PRIVATE}], demand, 2)
    check_room([{"CPU": 4.0}], demand, 200)
    with pytest.raises(ConfigError, match="room for 3 with 2 CPUs and 0 GPUs each, found 4 CPUs"):
        check_room([{"CPU": 4.0, **PRIVATE}], demand, 3)
    assert demand.amounts == {"CPU": 2.0}
