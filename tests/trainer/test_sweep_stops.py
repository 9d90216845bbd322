"""A sweep that is asked to stop, and what of its runs stays in memory."""

from __future__ import annotations

import gc
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from logitstore.errors import TrainingError
from trainer.checkpoint import find_latest_checkpoint, read_header
from trainer.config import TrainSettings
from trainer.distributed import Processes
from trainer.loop import TrainReport, take_step
from trainer.prefetch import PreparedStep
from trainer.progress import StepResult
from trainer.run import Run, prepare_run
from trainer.run_logs import RunLogs
from trainer.student import build_student
from trainer.sweep.record import SweepRecord
from trainer.sweep.settings import Sweep, read_sweep
from trainer.sweep.training import finish_sweep, train_sweep


@pytest.fixture
def write_sweep(make_settings: Callable[..., TrainSettings], tmp_path: Path) -> Callable[..., Sweep]:
    def write(runs: list[dict[str, Any]], **changes: object) -> Sweep:
        settings = make_settings(**{"steps": 3, "output": tmp_path / "sweep", **changes})
        values = {**settings.model_dump(mode="json", exclude_defaults=True), "runs": runs}
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        return read_sweep(tmp_path / "sweep.yaml")

    return write


def die(*_: object) -> TrainReport:
    raise KeyboardInterrupt  # as a cluster would that has waited long enough


def stop_after(name: str, step: int) -> Callable[[str, StepResult], None]:
    def stop(run: str, result: StepResult) -> None:
        if (run, result.step) == (name, step):
            signal.raise_signal(signal.SIGTERM)

    return stop


def read_steps(sweep: Sweep) -> list[int]:
    """Of the newest checkpoint of every run."""
    found = [find_latest_checkpoint(Path(run.settings.output) / "checkpoints") for run in sweep.runs]
    return [0 if path is None else read_header(path).step for path in found]


def test_sweep_that_is_asked_to_stop_while_students_are_loaded_loads_no_more(
    write_sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*arguments: Any) -> Run:
        signal.raise_signal(signal.SIGTERM)
        return prepare_run(*arguments)

    monkeypatch.setattr("trainer.sweep.group.prepare_run", prepare)
    report = train_sweep(write_sweep([{"name": "one"}, {"name": "two"}]))
    assert report.interrupted
    assert [(run.status, run.steps) for run in report.runs] == [("interrupted", 0), ("planned", 0)]


@pytest.mark.slow
def test_runs_that_a_stopped_sweep_did_not_come_to_are_as_their_checkpoints_left_them(
    write_sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = write_sweep([{"name": "one"}, {"name": "two"}, {"name": "three", "order_seed": 7}])
    first = train_sweep(sweep, on_step=stop_after("two", 2))
    saved = [(run.status, run.steps, run.positions) for run in first.runs]
    assert [status for status, *_ in saved] == ["interrupted", "interrupted", "planned"]
    monkeypatch.setattr("trainer.sweep.group.GroupTraining.should_stop", lambda _: True)
    assert [(run.status, run.steps, run.positions) for run in train_sweep(sweep).runs] == saved
    # On a cluster: of processes that were lost, and had no machine to go on with when the sweep was stopped.
    processes = Processes(rank=0, world_size=1, device=torch.device("cpu"))
    record = SweepRecord(sweep, [sweep.runs], processes)
    for run in sweep.runs:
        record.update(run.name, status="running", steps=1_000, positions=10**6)
    lost = finish_sweep(sweep, record, processes)
    assert [(run.status, run.steps, run.positions) for run in lost.runs] == [*saved[:2], ("interrupted", 0, 0)]
    assert lost.interrupted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("last_step", "what_takes_long"), [(2, "evaluate_run"), (3, "finish_run")], ids=["evaluation", "end"]
)
def test_sweep_that_is_asked_to_stop_saves_all_runs_before_anything_that_takes_long(
    write_sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch, last_step: int, what_takes_long: str
) -> None:
    sweep = write_sweep([{"name": "one", "steps": 5}, {"name": "asked", "evaluate_every": 2}, {"name": "later"}])
    with monkeypatch.context() as patch:
        patch.setattr(f"trainer.sweep.group.{what_takes_long}", die)
        with pytest.raises(KeyboardInterrupt):
            train_sweep(sweep, on_step=stop_after("asked", last_step))
    assert read_steps(sweep) == [last_step, last_step, last_step - 1]
    steps: list[tuple[str, int]] = []
    report = train_sweep(sweep, on_step=lambda name, result: steps.append((name, result.step)))
    assert steps[0] == ("later", last_step)
    assert [run.status for run in report.runs] == ["finished"] * 3


@pytest.mark.slow
def test_run_of_a_sweep_lets_go_of_its_student_when_it_is_over(
    write_sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is finished, and one that failed; the first brought the stream."""
    students: dict[str, weakref.ref[torch.nn.Module]] = {}

    def prepare(*arguments: Any) -> Run:
        run = prepare_run(*arguments)
        students[run.output.name] = weakref.ref(run.student)
        return run

    def diverge(run: Run, prepared: PreparedStep) -> StepResult:
        if run.output.name == "bad" and run.step == 1:
            raise TrainingError("step 1: expected a finite loss")
        return take_step(run, prepared)

    monkeypatch.setattr("trainer.sweep.group.prepare_run", prepare)
    monkeypatch.setattr("trainer.sweep.group.take_step", diverge)
    left: list[list[str]] = []

    def look(name: str, result: StepResult) -> None:
        if name == "long":
            left.append([one for one, student in students.items() if student() is not None])

    sweep = write_sweep(
        [{"name": "short", "steps": 1, "micro_batch_sequences": 2}, {"name": "bad"}, {"name": "long"}], held_out=None
    )
    report = train_sweep(sweep, on_step=look)
    assert [run.status for run in report.runs] == ["finished", "failed", "finished"]
    assert left == [["bad", "long"], ["long"], ["long"]]
    gc.collect()
    assert [one for one, student in students.items() if student() is not None] == []


@pytest.mark.slow
def test_run_that_memory_is_too_small_for_fails_alone(
    write_sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arguments: Any, seed: int, device: torch.device) -> torch.nn.Module:
        if seed == 7:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return build_student(*arguments, seed=seed, device=device)

    monkeypatch.setattr("trainer.run.build_student", build)
    report = train_sweep(write_sweep([{"name": "large", "seed": 7}, {"name": "good"}], steps=1, held_out=None))
    assert [(run.name, run.status) for run in report.runs] == [("large", "failed"), ("good", "finished")]
    assert "expected room in the memory of cpu, found CUDA out of memory" in str(report.runs[0].error)


def test_run_whose_files_cannot_be_opened_is_closed(
    write_sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Run] = []

    def refuse(run: Run) -> RunLogs:
        opened.append(run)
        raise OSError("no room")

    monkeypatch.setattr("trainer.sweep.group.RunLogs", refuse)
    with pytest.raises(OSError, match="no room"):
        train_sweep(write_sweep([{"name": "one"}], steps=1))
    assert opened[0].is_closed
