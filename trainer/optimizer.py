"""The optimizer, and how its learning rate and the distillation weight move over a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from logitstore.errors import ConfigError
from trainer.loss.settings import LossSettings
from trainer.optimizer_config import OptimizerSettings, ScheduleSettings

WARMUP_FRACTION = 0.02  # where no number of warm-up steps is given


class Optimizers:
    """One or several of torch's optimizers that share a student's parameters between them, used as one.

    Attributes:
        members: torch's own. `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict(model, members)` and its
            like take them as they are. No group of theirs is empty, which those functions would stumble over.
    """

    def __init__(self, members: Sequence[torch.optim.Optimizer], factors: Sequence[float] | None = None) -> None:
        """Join optimizers.

        Args:
            members: of disjoint parameters.
            factors: what a run's learning rate is multiplied by for each of them; None for 1.
        """
        self.members = tuple(members)
        self._factors = tuple(factors or [1.0] * len(self.members))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all members."""
        return [group for member in self.members for group in member.param_groups]

    def step(self) -> None:
        for member in self.members:
            member.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=set_to_none)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Give every group this learning rate times its member's factor."""
        for member, factor in zip(self.members, self._factors, strict=True):
            for group in member.param_groups:
                group["lr"] = learning_rate * factor

    def state_dict(self) -> dict[str, Any]:
        """The only member's state; of several, theirs in a list."""
        states = [member.state_dict() for member in self.members]
        return states[0] if len(states) == 1 else {"members": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on a state of `state_dict`.

        Raises:
            ValueError: it is of other optimizers.
        """
        states = state.get("members", [state])
        if len(states) != len(self.members):
            raise ValueError(f"expected the state of {len(self.members)} optimizers, found that of {len(states)}")
        for member, its_state in zip(self.members, states, strict=True):
            member.load_state_dict(its_state)

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self.members)


def build_optimizer(student: torch.nn.Module, settings: OptimizerSettings) -> Optimizers:
    """The optimizers of all parameters that are trained.

    Norms and biases (fewer than two dimensions) are not decayed. Muon moves the matrices of the body; embeddings, head,
    norms, biases and stacks of experts are moved by an AdamW beside it.

    Raises:
        ConfigError: the library of an 8-bit optimizer is not installed, or cannot be used here.
    """
    if settings.kind == "adamw":
        groups = _group_by_decay(_list_trained(student), settings)
        return Optimizers([torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)])
    if settings.kind == "adamw8bit":
        return Optimizers([_build_adamw_of_8_bits(student, settings)])
    return _build_muon(student, settings)


def _build_muon(student: torch.nn.Module, settings: OptimizerSettings) -> Optimizers:
    matrices, others = split_for_muon(student)
    members: list[torch.optim.Optimizer] = []
    factors = []
    if matrices:
        muon = torch.optim.Muon(
            matrices,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        members.append(muon)
        factors.append(1.0)
    if others:
        beside = settings.adamw_learning_rate or settings.learning_rate
        groups = _group_by_decay(others, settings)
        members.append(torch.optim.AdamW(groups, lr=beside, betas=settings.betas, fused=True))
        factors.append(beside / settings.learning_rate)
    return Optimizers(members, factors)


def split_for_muon(
    student: torch.nn.Module,
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """The trained matrices that Muon is for, and all other trained parameters.

    Embeddings and head map to or from the vocabulary, one row per id, and are left out of the first; so is what an
    adapter adds to them.
    """
    get_head = getattr(student, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    at_vocabulary = {
        id(parameter)
        for module in student.modules()
        if module is head or isinstance(getattr(module, "base_layer", module), torch.nn.Embedding)
        for parameter in module.parameters()
    }
    trained = _list_trained(student)
    is_matrix = [parameter.ndim == 2 and id(parameter) not in at_vocabulary for parameter in trained]
    matrices = [parameter for parameter, is_one in zip(trained, is_matrix, strict=True) if is_one]
    return matrices, [parameter for parameter, is_one in zip(trained, is_matrix, strict=True) if not is_one]


def _list_trained(student: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in student.parameters() if parameter.requires_grad]


def _group_by_decay(parameters: Sequence[torch.nn.Parameter], settings: OptimizerSettings) -> list[dict[str, Any]]:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _build_adamw_of_8_bits(student: torch.nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW of bitsandbytes, for CPUs and GPUs; parameters of fewer than 4096 numbers keep moments of 32 bits."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "optimizer.kind: expected bitsandbytes for adamw8bit, found it not installed; pip install "
            "'logitstore[adamw8bit]', or choose adamw"
        ) from error
    parameters = _list_trained(student)
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise ConfigError(
            "optimizer.kind: expected whole parameters for adamw8bit, found parts of them on every process; use "
            "parallel: ddp, or choose adamw"
        )
    groups = _group_by_decay(parameters, settings)
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=settings.learning_rate, betas=settings.betas)
    return optimizer


def set_learning_rate(optimizer: Optimizers, learning_rate: float) -> None:
    """Give every parameter group this learning rate, times what is its optimizer's own."""
    optimizer.set_learning_rate(learning_rate)


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
