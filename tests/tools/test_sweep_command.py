"""`logitstore sweep`: what it lists before, and what it shows after."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.look import format_short
from tools.sweep_plot import write_plot
from trainer.sweep.record import RunResult
from trainer.sweep.results import MeanResult
from trainer.sweep.training import SweepReport


def build_run(student: str, loss: str, seed: int, **changes: Any) -> RunResult:
    parameters = {"small": 1_000_000, "large": 12_000_000}[student]
    lm_loss = 3.0 + 0.01 * seed - (0.5 if loss == "kl" else 0.0) - (0.7 if student == "large" else 0.0)
    figures = {"lm_loss": lm_loss, "bucket_kl": lm_loss - 1.5, "teacher_lm_loss": 1.6, "calibration_error": 1.2}
    values: dict[str, Any] = {
        "name": f"{student}-{loss}-seed{seed}",
        "labels": {"student": student, "loss": loss, "seed": str(seed)},
        "output": "o",
        "stream": 0,
        "status": "finished",
        "steps": 10,
        "all_steps": 10,
        "positions": 123_456,
        "parameters": parameters,
        "seconds": 71.0,
        "evaluation": figures,
    }
    return RunResult(**{**values, **changes})


def build_report(folder: Path, *, interrupted: bool = False, **changes: Any) -> SweepReport:
    runs = [
        build_run(student, loss, seed) for student in ("small", "large") for loss in ("kl", "text") for seed in (0, 1)
    ]
    runs[-1] = build_run("large", "text", 1, **changes)
    means = [
        MeanResult(
            labels={"student": "small", "loss": "kl"},
            runs=2,
            parameters=1,
            mean={"lm_loss": 2.5},
            spread={"lm_loss": 0.01},
        )
    ]
    return SweepReport(output=folder, runs=runs, means=means, latest_manifests={"s": 3}, interrupted=interrupted)


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    values = {"store": "s", "global_batch_sequences": 8, "steps": 1000, "output": str(tmp_path / "o")}
    students = {"a": {"model": "m"}, "b": {"model": "n"}}
    path.write_text(yaml.safe_dump({**values, "students": students}), encoding="utf-8")
    return path


def test_dry_run_lists_runs_and_streams_and_opens_nothing(settings: Path, logitstore: Any) -> None:
    text, _ = logitstore(
        "sweep", settings, "--dry-run", "axes={batch: {large: {global_batch_sequences: 16}, same: {}}}"
    )
    assert "4 runs, 2 streams" in text
    lines = [line.split()[:3] for line in text.splitlines() if line.startswith(("a-", "b-"))]
    assert sorted(lines) == [
        ["a-large", "0", "1,000"],
        ["a-same", "1", "1,000"],
        ["b-large", "0", "1,000"],
        ["b-same", "1", "1,000"],
    ]
    [[one, other]] = logitstore.json("sweep", settings, "--dry-run")["streams"]
    assert (one["name"], other["labels"], one["steps"]) == ("a", {"student": "b"}, 1000)


@pytest.mark.parametrize(
    ("changes", "interrupted", "exit_code"),
    [
        ({}, False, 0),
        ({"status": "failed", "evaluation": None, "error": "step 3: expected a finite loss", "steps": 3}, False, 3),
        ({"status": "interrupted", "evaluation": None, "steps": 4}, True, 4),
    ],
)
def test_sweep_shows_every_run_and_ends_as_its_runs_did(
    changes: dict[str, Any],
    interrupted: bool,
    exit_code: int,
    settings: Path,
    logitstore: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = build_report(settings.parent, interrupted=interrupted, **changes)
    monkeypatch.setattr("trainer.sweep.training.train_sweep", lambda sweep, on_step: report)
    monkeypatch.setenv("COLUMNS", "160")
    text, _ = logitstore("sweep", settings, exit_code=exit_code)
    rows = {words[0]: words[1:] for line in text.splitlines() if (words := line.split())}
    assert rows["small-kl-seed0"][:1] == ["1M"]
    assert "2.5000" in rows["small-kl-seed0"]
    assert "2.5000 ± 0.0100" in text
    assert "3 of s" in text
    assert ("failed: step 3: expected a finite loss" in text) == (exit_code == 3)
    assert ("run the same command again" in text) == interrupted
    found = logitstore.json("sweep", settings, exit_code=exit_code)
    assert [run["name"] for run in found["runs"]] == [run.name for run in report.runs]
    assert Path(found["plot"]).read_text(encoding="utf-8").startswith("<?xml")


def test_sweep_on_a_cluster_shows_what_its_runs_cost(settings: Path, logitstore: Any, monkeypatch: Any) -> None:
    report = build_report(settings.parent, interrupted=False)
    runs = [run.model_copy(update={"cpus": 4.0, "gpus": 0.5}) for run in report.runs[:-1]] + [report.runs[-1]]
    on_cluster = replace(report, runs=runs)
    monkeypatch.setattr("trainer.sweep.training.train_sweep", lambda sweep, on_step: on_cluster)
    monkeypatch.setenv("COLUMNS", "170")
    text, _ = logitstore("sweep", settings)
    assert "GPU time" in text
    rows = {words[0]: " ".join(words[-6:]) for line in text.splitlines() if (words := line.split())}
    assert rows["small-kl-seed0"].endswith("1 min 11 s 36 s")
    assert rows["large-text-seed1"].endswith("1 min 11 s –")
    picture = (settings.parent / "sweep.svg").read_text(encoding="utf-8")
    assert ">GPU seconds<" in picture
    assert ">parameters<" in picture


def test_runs_of_one_stream_are_divided_among_workers(settings: Path, logitstore: Any) -> None:
    axes = "axes={rate: {one: {}, two: {optimizer: {learning_rate: 1.0e-3}}, three: {seed: 3}}}"
    for workers, expected in ((1, [6]), (2, [3, 3]), (3, [2, 2, 2]), (4, [1, 2, 1, 2]), (9, [1] * 6)):
        streams = logitstore.json("sweep", settings, "--dry-run", "--workers", str(workers), axes)["streams"]
        assert [len(stream) for stream in streams] == expected


def test_cpus_of_no_cluster_are_refused(settings: Path, logitstore: Any) -> None:
    _, errors = logitstore("sweep", settings, "--cpus", "2", exit_code=2)
    assert "--address or --workers" in errors


@pytest.mark.parametrize("verb", ["train", "sweep"])
def test_training_on_ray_without_what_it_needs_names_the_extra_that_brings_it(
    verb: str, settings: Path, logitstore: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = yaml.safe_load(settings.read_text(encoding="utf-8"))
    if verb == "train":
        values["student"] = values.pop("students")["a"]
    settings.write_text(yaml.safe_dump(values), encoding="utf-8")
    monkeypatch.setitem(sys.modules, "pandas", None)
    _, errors = logitstore(verb, settings, "--workers", "2", exit_code=2)
    assert "found no pandas" in errors
    assert "pip install 'logitstore[ray-train]'" in errors


def test_plot_has_every_student_and_the_same_bytes_twice(tmp_path: Path) -> None:
    report = build_report(tmp_path)
    path = write_plot(report, tmp_path / "sweep.svg")
    assert path is not None
    text = path.read_text(encoding="utf-8")
    for word in (
        "KL to the teacher, nats",
        "LM loss",
        ">teacher<",
        "parameters",
        ">1M<",
        ">12M<",
        ">small<",
        ">large<",
        ">kl<",
        ">text<",
    ):
        assert word in text, word
    assert path.read_bytes() == (write_plot(report, tmp_path / "again.svg") or path).read_bytes()


def test_sweep_without_figures_or_without_matplotlib_has_no_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    report = build_report(tmp_path)
    bare = [run.model_copy(update={"evaluation": None}) for run in report.runs]
    empty = SweepReport(output=tmp_path, runs=bare, means=[], latest_manifests={}, interrupted=False)
    assert write_plot(empty, tmp_path / "sweep.svg") is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert write_plot(report, tmp_path / "sweep.svg") is None
    assert "pip install 'logitstore[plot]'" in caplog.text
    assert not (tmp_path / "sweep.svg").exists()


@pytest.mark.parametrize(
    ("count", "text"), [(7, "7"), (999, "999"), (1234, "1.23k"), (999_999, "1M"), (52_400_000, "52.4M"), (8e9, "8G")]
)
def test_large_numbers_are_written_in_three_digits(count: float, text: str) -> None:
    assert format_short(count) == text
