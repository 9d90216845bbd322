"""The optimizer, and how its learning rate and the distillation weight move over a run."""

from __future__ import annotations

import math

import torch

from trainer.config import OptimizerSettings, ScheduleSettings
from trainer.loss.settings import LossSettings

WARMUP_FRACTION = 0.02  # where no number of warm-up steps is given


def build_optimizer(student: torch.nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over all parameters that are trained; norms and biases (fewer than two dimensions) are not decayed."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def compute_learning_rate_scale(step: int, steps: int, settings: ScheduleSettings) -> float:
    """What the peak learning rate is multiplied by at a step.

    Args:
        step: 0-based. Step 0 already learns; the decay would reach `final_fraction` at step `steps`, which is not run.
        steps: of the whole run.

    Returns:
        In [0, 1].

    Source: `wsd` with a 1 - sqrt decay: Hägele et al. 2024, arXiv:2405.18392.
    """
    warmup_steps = _resolve_warmup_steps(steps, settings)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if settings.kind == "constant":
        return 1.0
    if settings.kind == "cosine":
        progress = (step - warmup_steps) / (steps - warmup_steps)
        remaining = (1 + math.cos(math.pi * progress)) / 2
    else:
        decay_start = max(warmup_steps, steps - round(steps * settings.decay_fraction))
        if step < decay_start:
            return 1.0
        remaining = 1 - math.sqrt((step - decay_start) / (steps - decay_start))
    return settings.final_fraction + (1 - settings.final_fraction) * remaining


def compute_distillation_weight(step: int, steps: int, loss: LossSettings, schedule: ScheduleSettings) -> float:
    """The weight of the distillation term at a 0-based step, in [0, 1].

    `wsd` and `cosine` move like a learning rate of that kind with the same warm-up and decay settings, down to 0.

    Source: Peng et al. 2024, arXiv:2410.16215.
    """
    if loss.kind == "cross_entropy":
        return 0.0
    if loss.weight_schedule == "constant":
        return loss.weight
    shape = schedule.model_copy(update={"kind": loss.weight_schedule, "final_fraction": 0.0})
    return loss.weight * compute_learning_rate_scale(step, steps, shape)


def _resolve_warmup_steps(steps: int, settings: ScheduleSettings) -> int:
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    return round(steps * WARMUP_FRACTION)
