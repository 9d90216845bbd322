"""A request to stop is heard before what takes long."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import read_lines, train_until

from trainer.checkpoint import find_latest_checkpoint, read_header
from trainer.config import TrainSettings
from trainer.loop import train
from trainer.run import Run


def test_run_that_is_asked_to_stop_is_saved_before_it_is_evaluated(
    make_settings: Callable[..., TrainSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(run: Run) -> None:
        raise KeyboardInterrupt  # as a cluster would that has waited long enough

    monkeypatch.setattr("trainer.loop.evaluate_run", die)
    settings = make_settings(evaluate_every=3)
    with pytest.raises(KeyboardInterrupt):
        train_until(settings, 3)
    checkpoint = find_latest_checkpoint(Path(settings.output) / "checkpoints")
    assert checkpoint is not None
    assert read_header(checkpoint).step == 3


@pytest.mark.slow
def test_run_without_checkpoints_that_dies_at_its_end_makes_no_step_again(
    make_settings: Callable[..., TrainSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is evaluated and saved, which may take longer than whoever asked it to stop waits."""

    def die(run: Run) -> None:
        raise KeyboardInterrupt

    settings = make_settings(steps=2, checkpoint_every=None)
    with monkeypatch.context() as patch:
        patch.setattr("trainer.loop.evaluate_run", die)
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    steps: list[int] = []
    report = train(settings, on_step=lambda result: steps.append(result.step))
    assert (steps, report.steps, report.interrupted) == ([], 2, False)


@pytest.mark.slow
def test_records_of_a_rank_that_is_no_more_are_cut_where_the_run_goes_on(
    make_settings: Callable[..., TrainSettings],
) -> None:
    settings = make_settings(steps=4, log_records=True)
    train_until(settings, 2)
    gone = Path(settings.output) / "records-rank1.jsonl"
    gone.write_text("".join(f'{{"step": {step}, "records": []}}\n' for step in (1, 2, 3)), encoding="utf-8")
    train(settings)
    assert [line["step"] for line in read_lines(gone)] == [1, 2]
    assert [line["step"] for line in read_lines(gone.with_name("records-rank0.jsonl"))] == [1, 2, 3, 4]


@pytest.mark.slow
def test_run_that_is_done_and_made_again_has_one_evaluation_of_its_end(
    make_settings: Callable[..., TrainSettings],
) -> None:
    settings = make_settings(steps=2, evaluate_every=1)
    train(settings)
    train(settings)
    assert [line["step"] for line in read_lines(Path(settings.output) / "evaluations.jsonl")] == [1, 2]
