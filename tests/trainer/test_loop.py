"""Whole runs over a small store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import VOCAB_SIZE
from training_runs import read_checkpoint, read_lines, read_weights, train_until

from logitstore.errors import TrainingError
from logitstore.store.logit_store import LogitStore
from logitstore.stream.iterator import RecordStream
from logitstore.stream.selection import HeldOut, split_row_groups
from trainer.checkpoint import find_latest_checkpoint, read_header
from trainer.config import TrainSettings
from trainer.loop import TrainReport, train
from trainer.progress import StepResult
from trainer.stream_config import StreamSettings

MakeSettings = Callable[..., TrainSettings]


def run_killed_at(settings: TrainSettings, step: int) -> None:
    """Train in a process that gets SIGKILL right after a step, before its checkpoint."""
    script = (
        "import os, signal, sys\n"
        "from trainer.config import TrainSettings\n"
        "from trainer.loop import train\n"
        "train(TrainSettings.model_validate_json(sys.argv[1]), "
        "on_step=lambda result: result.step == int(sys.argv[2]) and os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, settings.model_dump_json(), str(step)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-3000:]


@pytest.fixture(scope="module")
def finished(
    make_settings_in: MakeSettings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainSettings, TrainReport]:
    """A run with dropout, that nothing interrupted; for reading only."""
    output = tmp_path_factory.mktemp("finished")
    config = {**(make_settings_in(output).student.config or {}), "attention_dropout": 0.2}
    settings = make_settings_in(output, student={"config": config}, checkpoint_every=8, log_records=True)
    return settings, train(settings)


def test_run_stopped_and_resumed_equals_the_run_that_never_stopped_bit_for_bit(
    finished: tuple[TrainSettings, TrainReport], tmp_path: Path
) -> None:
    settings, report = finished
    stopping = settings.model_copy(update={"output": str(tmp_path / "stopped")})
    for stop_step in (3, 4):
        stopped = train_until(stopping, stop_step)
        assert (stopped.interrupted, stopped.steps, stopped.student) == (True, stop_step, None)
    resumed = train(stopping)
    assert report.student is not None
    assert resumed.student is not None
    weights, expected = read_weights(resumed.student), read_weights(report.student)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert (resumed.steps, resumed.positions, resumed.evaluation) == (8, report.positions, report.evaluation)
    one, other = (read_checkpoint(Path(run.output) / "checkpoints/step-000008") for run in (settings, stopping))
    assert any(name.startswith("optimizer.") for name in one)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    records = [read_lines(Path(run.output) / "records-rank0.jsonl") for run in (settings, stopping)]
    assert records[0] == records[1]


@pytest.mark.slow
def test_run_killed_and_resumed_equals_the_run_that_never_stopped_bit_for_bit(
    finished: tuple[TrainSettings, TrainReport], tmp_path: Path
) -> None:
    """SIGKILL at step 5, after the checkpoint of step 4 and in the middle of a window of metrics."""
    settings, report = finished
    killed = settings.model_copy(update={"output": str(tmp_path / "killed"), "checkpoint_every": 2, "log_every": 1})
    run_killed_at(killed, 5)
    steps: list[int] = []
    resumed = train(killed, on_step=lambda result: steps.append(result.step))
    assert steps == [5, 6, 7, 8]
    assert report.student is not None
    assert resumed.student is not None
    weights, expected = read_weights(resumed.student), read_weights(report.student)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    lines = read_lines(tmp_path / "killed/metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 9))


def test_run_with_another_seed_is_another_run(finished: tuple[TrainSettings, TrainReport], tmp_path: Path) -> None:
    """What the comparison bit for bit would miss if nothing depended on anything."""
    settings, report = finished
    other = train(settings.model_copy(update={"seed": 1, "output": str(tmp_path / "other")}))
    assert report.student is not None
    assert other.student is not None
    weights, expected = read_weights(other.student), read_weights(report.student)
    assert not any(torch.equal(weights[name], expected[name]) for name in weights if weights[name].ndim > 1)


def test_run_that_is_finished_does_no_step_again(finished: tuple[TrainSettings, TrainReport]) -> None:
    settings, report = finished
    steps: list[int] = []
    again = train(settings, on_step=lambda result: steps.append(result.step))
    assert steps == []
    assert (again.steps, again.evaluation) == (report.steps, report.evaluation)


def test_run_reads_the_records_of_the_stream_and_none_that_are_held_out(
    finished: tuple[TrainSettings, TrainReport], taught_store: LogitStore
) -> None:
    settings, _ = finished
    lines = read_lines(Path(settings.output) / "records-rank0.jsonl")
    row_groups, _ = split_row_groups(taught_store, HeldOut(source="held"))
    stream = RecordStream(taught_store, row_groups=row_groups, global_batch_sequences=8, seed=0)
    expected = [[str(address) for address in next(stream).addresses()] for _ in range(8)]
    stream.close()
    assert [line["records"] for line in lines] == expected
    assert not any(address.startswith("3/") for line in lines for address in line["records"])


def test_run_with_other_settings_than_its_checkpoint_is_refused_with_both_values(
    finished: tuple[TrainSettings, TrainReport],
) -> None:
    settings, _ = finished
    changed = settings.model_copy(update={"global_batch_sequences": 16})
    with pytest.raises(TrainingError, match="in checkpoint: 8\n    in this run:   16"):
        train(changed)


def test_run_may_change_how_it_reports_and_cuts_its_batch(finished: tuple[TrainSettings, TrainReport]) -> None:
    settings, report = finished
    changed = settings.model_copy(update={"log_every": 1, "micro_batch_sequences": 2, "keep_checkpoints": 1})
    assert train(changed).steps == report.steps
    changed = settings.model_copy(update={"micro_batch_tokens": 20, "pack_sequences": True})
    changed = changed.model_copy(update={"stream": StreamSettings(read_ahead_steps=1, threads=1)})
    assert train(changed).steps == report.steps


def test_run_writes_metrics_of_every_window_and_of_the_held_out_records(make_settings: MakeSettings) -> None:
    settings = make_settings(steps=5, evaluate_every=2, loss={"kind": "bucket_kl", "weight": 0.75})
    report = train(settings)
    lines = read_lines(Path(settings.output) / "metrics.jsonl")
    trained = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in trained] == [2, 4, 5]
    assert [line["step"] for line in lines if "held_out/lm_loss" in line] == [2, 4, 5]
    for line in trained:
        mixed = 0.75 * line["train/bucket_kl"] + 0.25 * line["train/cross_entropy"]
        assert line["train/loss"] == pytest.approx(mixed)
        assert line["train/gradient_norm"] > 0
        assert 0 <= line["train/data_wait_fraction"] <= 1
    assert report.evaluation is not None
    assert lines[-1]["held_out/bucket_kl"] == report.evaluation.bucket_kl
    assert trained[-1]["train/positions"] == report.positions
    assert "global_batch_sequences: 8" in (Path(settings.output) / "settings.yaml").read_text(encoding="utf-8")


@pytest.mark.slow
def test_distilled_student_ends_closer_to_the_teacher_than_one_of_the_text_alone(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    """The text is random tokens, so all that can be learned is the teacher."""
    held_out_kls = {}
    for kind in ("bucket_kl", "cross_entropy"):
        report = train(make_settings(loss={"kind": kind}, steps=60, output=str(tmp_path / kind)))
        assert report.evaluation is not None
        held_out_kls[kind] = report.evaluation.bucket_kl
    kls = [
        line["train/bucket_kl"]
        for line in read_lines(tmp_path / "bucket_kl/metrics.jsonl")
        if "train/bucket_kl" in line
    ]
    assert kls[-1] < 0.7 * kls[0]
    assert held_out_kls["bucket_kl"] < 0.8 * held_out_kls["cross_entropy"]


def test_runs_of_two_losses_start_from_the_same_weights_and_batches(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    first = []
    for kind in ("bucket_kl", "cross_entropy"):
        train(make_settings(loss={"kind": kind}, steps=1, output=str(tmp_path / kind)), on_step=first.append)
    assert first[0].bucket_kl == first[1].bucket_kl
    assert first[0].cross_entropy == first[1].cross_entropy
    assert (first[0].distillation_weight, first[1].distillation_weight) == (0.8, 0.0)


def test_run_from_a_padded_head_trains_and_loads(make_settings: MakeSettings) -> None:
    settings = make_settings(steps=2)
    report = train(
        settings.model_copy(
            update={
                "student": settings.student.model_copy(
                    update={"config": {**(settings.student.config or {}), "vocab_size": VOCAB_SIZE + 14}}
                )
            }
        )
    )
    assert report.student is not None
    assert read_weights(report.student)["lm_head.weight"].shape[0] == VOCAB_SIZE + 14


@pytest.mark.parametrize("ahead", [1, 5])
def test_checkpoint_is_of_the_steps_done_and_not_of_those_prepared(make_settings: MakeSettings, ahead: int) -> None:
    settings = make_settings(stream={"prefetch_micro_batches": ahead})
    train_until(settings, 3)
    checkpoint = find_latest_checkpoint(Path(settings.output) / "checkpoints")
    assert checkpoint is not None
    header = read_header(checkpoint)
    assert (header.step, header.stream["step"]) == (3, 3)


def test_run_goes_on_with_its_manifest_after_the_store_has_grown(
    make_settings: MakeSettings, grow_store: Callable[[range], LogitStore]
) -> None:
    store = grow_store(range(2))
    settings = make_settings(store=store.url, held_out=None, log_records=True)
    train_until(settings, 4)
    assert len(grow_store(range(2, 4))) == 2 * len(store)
    report = train(settings)
    assert not report.interrupted
    units = {
        address.split("/")[0]
        for line in read_lines(Path(settings.output) / "records-rank0.jsonl")
        for address in line["records"]
    }
    assert units == {"0", "1"}


@pytest.mark.parametrize("changes", [{"precision": "bfloat16"}, {"student": {"dtype": "bfloat16"}}])
def test_run_in_bfloat16_has_the_losses_of_float32_within_its_precision(
    make_settings: MakeSettings, tmp_path: Path, changes: dict[str, Any]
) -> None:
    exact: list[StepResult] = []
    train(make_settings(steps=2), on_step=exact.append)
    if "student" in changes:
        changes = {"student": {**make_settings().student.model_dump(), **changes["student"]}}
    rounded: list[StepResult] = []
    train(make_settings(steps=2, output=tmp_path / "rounded", **changes), on_step=rounded.append)
    for one, other in zip(exact, rounded, strict=True):
        # Logits are below 1 here and bfloat16 holds 8 bits of each.
        assert other.loss == pytest.approx(one.loss, rel=0.01)
        assert other.loss != one.loss
