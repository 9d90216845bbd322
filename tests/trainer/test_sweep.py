"""Sweeps over a small store: every run ends as it would alone, whatever happens beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkout import ROOT
from taught_stores import CONFIG
from training_runs import read_lines, read_weights

from logitstore.errors import TrainingError
from logitstore.settings import read_settings
from logitstore.store.logit_store import LogitStore
from logitstore.stream.iterator import RecordStream
from trainer.config import TrainSettings
from trainer.loop import take_step, train
from trainer.prefetch import PreparedStep
from trainer.progress import StepResult
from trainer.run import Run
from trainer.sweep.results import compute_gaps
from trainer.sweep.settings import Sweep, read_sweep
from trainer.sweep.training import SweepReport, train_sweep

SMALL = {"config": {**CONFIG, "attention_dropout": 0.2}}
WIDE = {"config": {**CONFIG, "hidden_size": 32}}
WriteSweep = Callable[..., Sweep]

# Is killed by itself right after a step of a run, before its checkpoint.
KILLED = """
import os, signal, sys
from trainer.sweep.settings import read_sweep
from trainer.sweep.training import train_sweep

def kill(name, result):
    if (name, result.step) == (sys.argv[2], int(sys.argv[3])):
        os.kill(os.getpid(), signal.SIGKILL)

train_sweep(read_sweep(sys.argv[1]), on_step=kill)
"""


@pytest.fixture(scope="module")
def swept(write_sweep_in: Callable[..., Sweep], tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, SweepReport]:
    """Two students, with dropout and without, two losses and two seeds; for reading only."""
    sweep = write_sweep_in(
        tmp_path_factory.mktemp("swept"),
        students={"small": SMALL, "wide": WIDE},
        losses={"kl": {"kind": "bucket_kl"}, "text": {"kind": "cross_entropy"}},
        seeds=[0, 1],
        evaluate_every=4,
        log_records=True,
    )
    return sweep, train_sweep(sweep)


def train_alone(settings: TrainSettings, folder: Path) -> TrainSettings:
    """Train a run of a sweep by itself; the settings that this was done with."""
    alone = settings.model_copy(update={"output": str(folder / "alone" / Path(settings.output).name)})
    train(alone)
    return alone


def list_results(settings: TrainSettings) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], list[dict[str, Any]]]:
    """Weights, metrics without those that are times, and records of a finished run."""
    output = Path(settings.output)
    lines = read_lines(output / "metrics.jsonl")
    times = ("train/positions_per_second", "train/data_wait_fraction")
    metrics = [{name: value for name, value in line.items() if name not in times} for line in lines]
    records = output / "records-rank0.jsonl"
    return read_weights(output / "student"), metrics, read_lines(records) if records.exists() else []


def assert_same_run(one: TrainSettings, other: TrainSettings) -> None:
    (weights, metrics, records), (expected, *logs) = list_results(one), list_results(other)
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []
    assert [metrics, records] == logs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small-kl-seed0", "small-text-seed1", "wide-kl-seed1"])
def test_run_of_a_sweep_is_the_run_alone_bit_for_bit(
    swept: tuple[Sweep, SweepReport], name: str, tmp_path: Path
) -> None:
    _, report = swept
    [result] = [run for run in report.runs if run.name == name]
    settings = read_settings(TrainSettings, Path(result.output) / "settings.yaml")
    alone = train_alone(settings, tmp_path)
    assert_same_run(settings, alone)
    here, there = (sorted(path.name for path in Path(run.output).iterdir()) for run in (settings, alone))
    assert here == there
    assert settings.manifest == 1


def test_sweep_multiplies_its_axes_and_reports_every_run(swept: tuple[Sweep, SweepReport]) -> None:
    sweep, report = swept
    assert [run.name for run in report.runs] == [
        f"{student}-{loss}-seed{seed}" for student in ("small", "wide") for loss in ("kl", "text") for seed in (0, 1)
    ]
    assert {(run.status, run.steps, run.stream, run.positions) for run in report.runs} == {
        ("finished", 6, 0, report.runs[0].positions)
    }
    assert report.runs[0].parameters != report.runs[4].parameters
    assert (report.interrupted, report.failed) == (False, [])
    written = json.loads((sweep.output / "sweep.json").read_text(encoding="utf-8"))
    assert [run["evaluation"]["lm_loss"] for run in written["runs"]] == [
        run.evaluation["lm_loss"] for run in report.runs if run.evaluation
    ]
    assert [store["manifest"] for store in written["stores"]] == [1]
    assert [mean.labels for mean in report.means] == [
        {"student": student, "loss": loss} for student in ("small", "wide") for loss in ("kl", "text")
    ]
    # The text is random, and the teacher no better at it than a student of the text alone.
    assert [run.gap_closed for run in report.runs] == [None] * 8


def test_gap_of_every_run_of_a_sweep_is_to_its_own_student_of_the_text(swept: tuple[Sweep, SweepReport]) -> None:
    """Of the same size and seed; as if the teacher were of loss 0."""
    sweep, report = swept
    losses = {run.name: (run.evaluation or {})["lm_loss"] for run in report.runs}
    results = [
        run.model_copy(update={"evaluation": {**(run.evaluation or {}), "teacher_lm_loss": 0.0}}) for run in report.runs
    ]
    gaps = {run.name: run.gap_closed for run in compute_gaps(results, {run.name: run.settings for run in sweep.runs})}
    assert gaps == {
        name: pytest.approx(100 * (1 - loss / losses[name.replace("kl", "text")])) for name, loss in losses.items()
    }
    assert len(set(losses.values())) == 8


def test_sweep_again_trains_nothing_and_reports_the_same(swept: tuple[Sweep, SweepReport]) -> None:
    sweep, report = swept
    steps: list[str] = []
    again = train_sweep(sweep, on_step=lambda name, result: steps.append(name))
    assert steps == []
    assert again == report


def test_content_of_sweep_json_is_a_sweep_file_of_the_same_runs(
    swept: tuple[Sweep, SweepReport], tmp_path: Path
) -> None:
    sweep, _ = swept
    written = json.loads((sweep.output / "sweep.json").read_text(encoding="utf-8"))
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(written["sweep"]), encoding="utf-8")
    again = read_sweep(tmp_path / "again.yaml")
    assert [(run.name, run.labels, run.settings) for run in again.runs] == [
        (run.name, run.labels, run.settings) for run in sweep.runs
    ]


def test_finished_run_with_other_settings_is_refused_with_both_values(swept: tuple[Sweep, SweepReport]) -> None:
    sweep, _ = swept
    changed = read_sweep(sweep.file, ["optimizer.learning_rate=0.5"])
    with pytest.raises(
        TrainingError, match=r"(?s)sweep\.json: \S+: belongs to.*in checkpoint: 0\.01\n    in this run:   0\.5"
    ):
        train_sweep(changed)


def test_runs_of_one_stream_have_every_step_read_once(write_sweep: WriteSweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ones that lay it out in different ways, and that end at different steps, included."""
    read: Counter[int] = Counter()
    take = RecordStream.__next__

    def count(stream: RecordStream) -> object:
        read[stream.step] += 1
        return take(stream)

    monkeypatch.setattr(RecordStream, "__next__", count)
    made: Counter[int] = Counter()
    collate = Run.collate

    def count_collated(run: Run, batch: Any) -> object:
        made[run.settings.micro_batch_sequences or 0] += 1
        return collate(run, batch)

    monkeypatch.setattr(Run, "collate", count_collated)
    runs = [
        {"name": "one"},
        {"name": "other", "loss": {"kind": "cross_entropy"}},
        {"name": "cut", "micro_batch_sequences": 2},
        {"name": "cut-too", "micro_batch_sequences": 2, "seed": 3},
        {"name": "longer", "steps": 9},
    ]
    sweep = write_sweep(student=SMALL, runs=runs, stream={"prefetch_micro_batches": 1}, held_out=None)
    steps: Counter[str] = Counter()
    train_sweep(sweep, on_step=lambda name, result: steps.update([name]))
    assert steps == {"one": 6, "other": 6, "cut": 6, "cut-too": 6, "longer": 9}
    assert [read[step] for step in range(9)] == [1] * 9
    # The thread is two micro-batches ahead at most: one that waits, one in its hands.
    assert made[2] == 6 * 4
    assert 9 <= made[0] <= 11


@pytest.mark.slow
def test_sweep_killed_and_started_again_equals_the_runs_alone_bit_for_bit(
    write_sweep: WriteSweep, tmp_path: Path
) -> None:
    """SIGKILL when the run in the middle has made step 5: the others have their checkpoints of steps 4, 0, 3 and 2."""
    runs: list[dict[str, object]] = [
        {"name": "even", "checkpoint_every": 2, "support_slots": 4},
        {"name": "none", "loss": {"kind": "cross_entropy"}, "seed": 1},
        {"name": "third", "checkpoint_every": 3, "micro_batch_sequences": 2},
        {"name": "short", "steps": 2, "student": WIDE},
    ]
    sweep = write_sweep(student=SMALL, runs=runs, log_records=True, log_every=1)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, sweep.file, "third", "5"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-3000:]
    statuses = {
        run["name"]: (run["status"], run["steps"])
        for run in json.loads((sweep.output / "sweep.json").read_text(encoding="utf-8"))["runs"]
    }
    assert statuses == {
        "even": ("running", 4),
        "none": ("running", 0),
        "third": ("running", 3),
        "short": ("finished", 2),
    }
    steps: list[tuple[str, int]] = []
    report = train_sweep(sweep, on_step=lambda name, result: steps.append((name, result.step)))
    assert steps == [
        *(("none", step) for step in (1, 2, 3)),
        *((name, 4) for name in ("none", "third")),
        *((name, step) for step in (5, 6) for name in ("even", "none", "third")),
    ]
    assert {run.status for run in report.runs} == {"finished"}
    for run in sweep.runs:
        assert_same_run(run.settings, train_alone(run.settings, tmp_path))


def test_sweep_asked_to_stop_goes_on_with_its_manifest_after_the_store_has_grown(
    write_sweep: WriteSweep, grow_store: Callable[[range], LogitStore]
) -> None:
    store = grow_store(range(2))
    sweep = write_sweep(
        store=store.url, students={"small": SMALL}, seeds=[0, 1], held_out=None, log_records=True, runs_at_once=1
    )

    def stop(name: str, result: StepResult) -> None:
        if result.step == 3:
            signal.raise_signal(signal.SIGTERM)

    first = train_sweep(sweep, on_step=stop)
    assert [(run.status, run.steps, run.stream) for run in first.runs] == [("interrupted", 3, 0), ("planned", 0, 1)]
    assert first.interrupted
    assert len(grow_store(range(2, 4))) == 2 * len(store)
    report = train_sweep(sweep)
    assert [run.status for run in report.runs] == ["finished"] * 2
    assert report.latest_manifests == {store.url: 1}
    batches = [
        [line["records"] for line in read_lines(Path(run.output) / "records-rank0.jsonl")] for run in report.runs
    ]
    assert batches[0] == batches[1]
    assert {address.split("/")[0] for batch in batches[0] for address in batch} == {"0", "1"}


@pytest.mark.slow
def test_sweep_whose_record_is_gone_goes_on_with_the_manifest_of_its_runs(
    write_sweep: WriteSweep, grow_store: Callable[[range], LogitStore], caplog: pytest.LogCaptureFixture
) -> None:
    store = grow_store(range(2))
    sweep = write_sweep(store=store.url, students={"small": SMALL}, seeds=[0, 1], held_out=None, steps=2)
    train_sweep(sweep)
    (sweep.output / "sweep.json").unlink()
    grow_store(range(2, 4))
    steps: list[str] = []
    report = train_sweep(sweep, on_step=lambda name, result: steps.append(name))
    assert (steps, [run.status for run in report.runs]) == ([], ["finished"] * 2)
    assert report.latest_manifests == {store.url: 1}
    assert "expected it beside runs that have begun (small-seed0, small-seed1), found none" in caplog.text


@pytest.mark.slow
def test_manifest_of_a_run_that_names_it_is_not_the_latest_of_others(
    write_sweep: WriteSweep, grow_store: Callable[[range], LogitStore]
) -> None:
    """Where the record is gone."""
    grow_store(range(2))
    store = grow_store(range(2, 4))
    runs = [{"name": "first", "manifest": 1}, {"name": "latest"}]
    sweep = write_sweep(store=store.url, student=SMALL, runs=runs, held_out=None, steps=1)
    train_sweep(sweep)
    (sweep.output / "sweep.json").unlink()
    report = train_sweep(sweep)
    assert [run.status for run in report.runs] == ["finished"] * 2
    assert report.latest_manifests == {store.url: 2}


def test_run_that_fails_leaves_the_others_alone_and_is_tried_again(
    write_sweep: WriteSweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[dict[str, object]] = [
        {"name": "good"},
        {"name": "bad", "seed": 1},
        {"name": "unfit", "support_slots": 4},
    ]
    runs[2]["student"] = {"config": {**CONFIG, "max_position_embeddings": 8}}
    sweep = write_sweep(student=SMALL, runs=runs)

    def diverge(run: Run, prepared: PreparedStep) -> StepResult:
        if run.output.name == "bad" and run.step == 3:
            next(iter(prepared.micro_batches))  # takes a part of what it shares, and no more
            raise TrainingError("step 3: expected a finite loss")
        return take_step(run, prepared)

    with monkeypatch.context() as patch:
        patch.setattr("trainer.sweep.group.take_step", diverge)
        report = train_sweep(sweep)
    assert [(run.name, run.status, run.steps) for run in report.runs] == [
        ("good", "finished", 6),
        ("bad", "failed", 3),
        ("unfit", "failed", 0),
    ]
    assert [run.name for run in report.failed] == ["bad", "unfit"]
    assert "finite loss" in str(report.runs[1].error)
    assert "reads fewer positions" in str(report.runs[2].error)
    assert_same_run(sweep.runs[0].settings, train_alone(sweep.runs[0].settings, tmp_path))
    steps: Counter[str] = Counter()
    again = train_sweep(sweep, on_step=lambda name, result: steps.update([name]))
    assert (again.runs[1].status, again.runs[1].error, steps) == ("finished", None, {"bad": 6})


@pytest.mark.slow
def test_sweep_of_two_processes_trains_the_students_that_one_does(write_sweep: WriteSweep, tmp_path: Path) -> None:
    runs = [{"name": "ddp"}, {"name": "fsdp", "parallel": "fsdp", "loss": {"kind": "cross_entropy"}}]
    sweep = write_sweep(student={"config": CONFIG}, runs=runs, steps=3)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "tools.sweep", sweep.file, "--json", "--quiet"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert [(run["name"], run["status"], run["steps"]) for run in report["runs"]] == [
        ("ddp", "finished", 3),
        ("fsdp", "finished", 3),
    ]
    for run in sweep.runs:
        alone, _, _ = list_results(train_alone(run.settings, tmp_path))
        weights, _, _ = list_results(run.settings)
        for name, value in alone.items():
            # As in test_distributed: Adam makes a part of the learning rate, 1e-2, of a small gradient's rounding.
            torch.testing.assert_close(weights[name], value, rtol=0, atol=2e-4)
