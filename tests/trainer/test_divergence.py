"""Steps without a finite loss or gradient leave the student as it was."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import read_lines, read_weights, train_until

from logitstore.errors import TrainingError
from trainer.checkpoint import find_latest_checkpoint, read_header
from trainer.config import TrainSettings
from trainer.distributed import Processes
from trainer.divergence import SkippedSteps
from trainer.loop import take_step, train
from trainer.loss.objective import DistillationLoss
from trainer.progress import StepResult
from trainer.run import prepare_run
from trainer.taught_student import TaughtStudent

ALONE = Processes(rank=0, world_size=1, device=torch.device("cpu"))

MakeSettings = Callable[..., TrainSettings]
Spoil = Callable[[set[int]], None]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spoil]:
    """Function that makes the gradients of some passes through a student infinite, counted from 1."""
    forward = TaughtStudent.forward
    passes: list[int] = []

    def start(bad: set[int]) -> None:
        passes.clear()

        def run(student: TaughtStudent, *args: Any) -> DistillationLoss:
            passes.append(1)
            loss = forward(student, *args)
            return replace(loss, total=loss.total * math.inf) if len(passes) in bad else loss

        monkeypatch.setattr(TaughtStudent, "forward", run)

    yield start
    assert passes


def test_skipped_step_leaves_weights_and_optimizer_as_they_were_and_counts(
    make_settings: MakeSettings, spoil: Spoil, caplog: pytest.LogCaptureFixture
) -> None:
    run = prepare_run(make_settings(max_skipped_steps=1), ALONE)
    batches = [next(run.stream) for _ in range(2)]
    spoil({2})
    first = take_step(run, run.prepare(batches[0]))
    [optimizer] = run.optimizer.members
    before = [value.clone() for value in run.student.state_dict().values()]
    state = str(optimizer.state_dict()["state"])
    with caplog.at_level(logging.WARNING):
        second = take_step(run, run.prepare(batches[1]))
    run.close()
    assert all(torch.equal(a, b) for a, b in zip(run.student.state_dict().values(), before, strict=True))
    assert str(optimizer.state_dict()["state"]) == state
    assert all(parameter.grad is None for parameter in run.student.parameters())
    assert (run.step, run.positions, run.skipped) == (2, first.positions, SkippedSteps(total=1, in_a_row=1))
    assert (first.is_skipped, first.skipped_steps, second.is_skipped, second.skipped_steps) == (False, 0, True, 1)
    assert second.learning_rate > 0
    assert "step 1: skipped: expected a finite loss and gradient" in caplog.text
    assert all(str(address) in caplog.text for address in batches[1].addresses())


def test_one_step_too_many_in_a_row_ends_the_run(make_settings: MakeSettings, spoil: Spoil) -> None:
    spoil({2, 4, 5, 6})
    steps: list[StepResult] = []
    with pytest.raises(TrainingError, match=r"step 5: expected a finite.*after 2 more in a row that were skipped"):
        train(make_settings(max_skipped_steps=2), on_step=steps.append)
    assert [step.is_skipped for step in steps] == [False, True, False, True, True]


def test_run_with_skipped_steps_ends_with_their_number_in_report_metrics_and_checkpoint(
    make_settings: MakeSettings, spoil: Spoil
) -> None:
    settings = make_settings(checkpoint_every=8, log_every=1)
    spoil({2, 4, 5})
    report = train(settings)
    assert (report.steps, report.skipped_steps, report.interrupted) == (8, 3, False)
    lines = read_lines(Path(settings.output) / "metrics.jsonl")
    trained = [line for line in lines if "train/skipped_steps" in line]
    assert [line["train/skipped_steps"] for line in trained] == [0, 1, 1, 2, 3, 3, 3, 3]
    assert ["train/loss" in line for line in trained] == [True, False, True, False, False, True, True, True]
    assert report.student is not None
    assert all(value.isfinite().all() for value in read_weights(report.student).values())
    assert "sequences, 3 of them skipped:" in (report.student / "README.md").read_text(encoding="utf-8")
    checkpoint = find_latest_checkpoint(Path(settings.output) / "checkpoints")
    assert checkpoint is not None
    assert (read_header(checkpoint).skipped_steps, read_header(checkpoint).skipped_in_a_row) == (3, 0)


def test_steps_skipped_in_a_row_are_counted_over_a_stop(make_settings: MakeSettings, spoil: Spoil) -> None:
    """And a run that was stopped before its optimizer had any state goes on as if it had not been."""
    settings = make_settings(max_skipped_steps=2)
    spoil({1, 2})
    assert train_until(settings, 2).skipped_steps == 2
    header = json.loads((Path(settings.output) / "checkpoints/step-000002/checkpoint.json").read_text("utf-8"))
    assert (header["skipped_steps"], header["skipped_in_a_row"], header["positions"]) == (2, 2, 0)
    spoil({1})
    with pytest.raises(TrainingError, match=r"step 2: .*after 2 more in a row"):
        train(settings)
    spoil(set())
    resumed = train(settings)
    whole = settings.model_copy(update={"output": f"{settings.output}-whole"})
    spoil({1, 2})
    expected = train(whole)
    assert (resumed.skipped_steps, resumed.evaluation) == (2, expected.evaluation)
