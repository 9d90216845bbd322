"""Lines of metrics, and the means in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.metrics import JsonLines, MetricsWriter
from trainer.progress import StepResult, StepWindow


def read_steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines_opened_again_drop_what_a_killed_run_wrote_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    lines = JsonLines(path, first_step=0)
    for step in (2, 4, 6):
        lines.write(step, {"value": 0.5})
    lines.close()
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 8, "val')  # killed while writing
    lines = JsonLines(path, first_step=4)
    lines.write(6, {"value": 0.25})
    lines.close()
    assert read_steps(path) == [2, 4, 6]
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[-1]) == {"step": 6, "value": 0.25}


def test_lines_are_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "lines.jsonl", first_step=0)
    lines.write(1, {"value": 1.0})
    assert read_steps(tmp_path / "lines.jsonl") == [1]
    lines.close()


@pytest.mark.slow
def test_metrics_reach_tensorboard(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsWriter(tmp_path, first_step=0) as metrics:
        metrics.write(10, {"train/loss": 1.5})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 1.5)]


def test_window_means_weigh_steps_by_their_taught_positions() -> None:
    window = StepWindow()
    for step, (kl, taught) in enumerate([(1.0, 10), (4.0, 30)], start=1):
        window.add(
            StepResult(
                step=step,
                loss=3 * kl,
                bucket_kl=kl,
                cross_entropy=2 * kl,
                distillation_weight=0.75,
                learning_rate=0.1 * step,
                gradient_norm=1.0,
                positions=40,
                taught_positions=taught,
            )
        )
    means = window.compute_means(total_positions=80, data_wait_seconds=0.0)
    assert means["train/bucket_kl"] == pytest.approx(3.25)
    assert means["train/cross_entropy"] == pytest.approx(6.5)
    assert means["train/loss"] == pytest.approx(9.75)
    assert means["train/learning_rate"] == pytest.approx(0.2)
    assert means["train/positions"] == 80
    assert means["train/positions_per_second"] > 0
