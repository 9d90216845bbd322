"""Schedules at their boundaries, and which parameters decay."""

from __future__ import annotations

import pytest
import torch

from trainer.config import OptimizerSettings, ScheduleSettings
from trainer.loss.settings import LossSettings
from trainer.optimizer import (
    build_optimizer,
    compute_distillation_weight,
    compute_learning_rate_scale,
    set_learning_rate,
)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.1),
        (9, 1.0),  # the last step of the warm-up is the first at the peak
        (10, 1.0),
        (79, 1.0),
        (80, 1.0),  # the decay starts here
        (85, 0.2 + 0.8 * 0.5),  # 1 - sqrt(1/4)
        (99, 0.2 + 0.8 * (1 - 0.95**0.5)),
    ],
)
def test_wsd_scale_at_its_boundaries(step: int, expected: float) -> None:
    schedule = ScheduleSettings(kind="wsd", warmup_steps=10, decay_fraction=0.2, final_fraction=0.2)
    assert compute_learning_rate_scale(step, 100, schedule) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.1), (9, 1.0), (10, 1.0), (55, 0.6), (100, 0.2)])
def test_cosine_scale_at_its_boundaries(step: int, expected: float) -> None:
    schedule = ScheduleSettings(kind="cosine", warmup_steps=10, final_fraction=0.2)
    assert compute_learning_rate_scale(step, 100, schedule) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.25), (3, 1.0), (99, 1.0)])
def test_constant_scale_only_warms_up(step: int, expected: float) -> None:
    assert compute_learning_rate_scale(step, 100, ScheduleSettings(kind="constant", warmup_steps=4)) == expected


def test_scale_without_warmup_steps_takes_two_percent_of_the_run() -> None:
    scales = [compute_learning_rate_scale(step, 200, ScheduleSettings(kind="constant")) for step in range(5)]
    assert scales == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 6])
@pytest.mark.parametrize("decay_fraction", [0.0, 1.0])
def test_scale_of_extreme_settings_stays_above_zero(kind: str, warmup_steps: int, decay_fraction: float) -> None:
    schedule = ScheduleSettings.model_validate(
        {"kind": kind, "warmup_steps": warmup_steps, "decay_fraction": decay_fraction}
    )
    assert all(0 < compute_learning_rate_scale(step, 6, schedule) <= 1 for step in range(6))


def test_distillation_weight_of_a_text_only_run_is_zero() -> None:
    loss = LossSettings(kind="cross_entropy", weight=0.8)
    assert compute_distillation_weight(5, 10, loss, ScheduleSettings()) == 0.0


def test_distillation_weight_follows_a_wsd_shape_under_any_learning_rate() -> None:
    loss = LossSettings(weight=0.5, weight_schedule="wsd")
    schedule = ScheduleSettings(kind="cosine", warmup_steps=2, decay_fraction=0.4, final_fraction=0.3)
    weights = [compute_distillation_weight(step, 10, loss, schedule) for step in (0, 1, 5, 6, 7)]
    assert weights == pytest.approx([0.25, 0.5, 0.5, 0.5, 0.25])


def test_distillation_weight_follows_a_cosine_to_zero() -> None:
    loss = LossSettings(weight=0.5, weight_schedule="cosine")
    schedule = ScheduleSettings(kind="wsd", warmup_steps=2, final_fraction=0.3)
    weights = [compute_distillation_weight(step, 10, loss, schedule) for step in (0, 1, 2, 6, 10)]
    assert weights == pytest.approx([0.25, 0.5, 0.5, 0.25, 0.0])


def test_distillation_weight_is_constant_by_default() -> None:
    weights = {
        compute_distillation_weight(step, 10, LossSettings(weight=0.7), ScheduleSettings()) for step in range(10)
    }
    assert weights == {0.7}


def test_optimizer_decays_matrices_alone() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    optimizer = build_optimizer(module, OptimizerSettings(learning_rate=0.1, weight_decay=0.5, betas=(0.8, 0.9)))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in module.parameters()] == [0.5, 0.0, 0.0, 0.0]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}
    set_learning_rate(optimizer, 0.025)
    assert {group["lr"] for group in optimizer.param_groups} == {0.025}
