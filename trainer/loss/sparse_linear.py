"""The losses from hidden states and a head, without the logits of more than a few positions at a time.

Positions are taken in tiles. A tile's logits become its losses, and at once its part of every gradient, written over
the logits; then the next tile takes their place. So the head is multiplied three times, as in plain cross-entropy,
and memory is one tile, the gradients themselves, and the teacher's K slots per position. What is left to the backward
pass is to multiply by the number that arrives there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from logitstore.errors import ConfigError, ShapeError
from trainer.loss.gradient_form import compute_cross_entropy_form, compute_loss_and_gradient
from trainer.loss.head import LinearHead
from trainer.loss.parts import SignalTensors
from trainer.loss.settings import LossSettings
from trainer.loss.tiles import HeadFactor, LogitsTile, compute_row_ranges

# Of logits in float32. 64 positions of 151,936 ids: larger tiles are faster by less than the machine's noise.
DEFAULT_TILE_BYTES = 40 * 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearTargets:
    """What N positions are taught.

    Attributes:
        next_ids: [N] int64.
        support_ids: [N, K] int64, no repeats among the filled slots; K may be 0.
        signal: N positions, K slots.
        distillation_weight: [N] float, of the distillation term; 0 takes it out.
        cross_entropy_weight: [N] float, of -log q of the next token. A position where both are 0 costs nothing.
    """

    next_ids: torch.Tensor
    support_ids: torch.Tensor
    signal: SignalTensors
    distillation_weight: torch.Tensor
    cross_entropy_weight: torch.Tensor

    def select(self, rows: torch.Tensor | slice) -> LinearTargets:
        """The targets of some of the positions."""
        weights = self.signal.support_weights
        return LinearTargets(
            next_ids=self.next_ids[rows],
            support_ids=self.support_ids[rows],
            signal=SignalTensors(
                support_logprobs=self.signal.support_logprobs[rows],
                tail_logprob=self.signal.tail_logprob[rows],
                support_weights=None if weights is None else weights[rows],
            ),
            distillation_weight=self.distillation_weight[rows],
            cross_entropy_weight=self.cross_entropy_weight[rows],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearLosses:
    """The losses of N positions.

    Attributes:
        total: [] the sum over positions of weight times loss; float32, or float64 where the head is; differentiable.
        distillation: [N] nats, without weight and gradient; 0 at positions that were left out.
        cross_entropy: [N], likewise.
    """

    total: torch.Tensor
    distillation: torch.Tensor
    cross_entropy: torch.Tensor


def compute_sparse_linear_loss(
    loss: LossSettings,
    hidden: torch.Tensor,
    head: LinearHead,
    targets: LinearTargets,
    *,
    tile_bytes: int = DEFAULT_TILE_BYTES,
) -> LinearLosses:
    """Distillation and cross-entropy of hidden states under a head, weighted and summed.

    Products run in the dtype of the weight, or of autocast; everything else, sums of gradients over tiles included, in
    float32. Differentiable once, in the hidden states and every tensor of the head.

    Args:
        loss: `kind` and its options; its weight and entropy rules are the caller's, in `targets`.
        hidden: [N, D] float.
        head: of V columns without padding.
        targets: ids below V.
        tile_bytes: bound of a tile of logits; one position is held whatever it takes.

    Raises:
        ShapeError: hidden states, head and targets do not fit together.
        ConfigError: the head is float16; the signal lacks what `loss.kind` needs.
    """
    _check(hidden, head, targets)
    is_taught = (targets.distillation_weight != 0) | (targets.cross_entropy_weight != 0)
    rows = None if bool(is_taught.all()) else is_taught.nonzero().squeeze(-1)
    if rows is not None:
        hidden, targets = hidden[rows], targets.select(rows)
    factors = [tensor for term in head.low_rank for tensor in (term.project(hidden), term.up)]
    plan = _Plan(loss=loss, head=head, targets=targets, tile_bytes=tile_bytes, needs_gradient=torch.is_grad_enabled())
    total, distillation, cross_entropy = _SparseLinearLoss.apply(  # type: ignore[no-untyped-call]
        plan, head.bias, hidden, head.weight, *factors
    )
    if rows is not None:
        everywhere = distillation.new_zeros(2, len(is_taught))
        distillation, cross_entropy = everywhere.index_copy_(1, rows, torch.stack([distillation, cross_entropy]))
    return LinearLosses(total=total, distillation=distillation, cross_entropy=cross_entropy)


def _check(hidden: torch.Tensor, head: LinearHead, targets: LinearTargets) -> None:
    N, K = targets.support_ids.shape
    expected = {"hidden": (N, head.weight.shape[1]), "next_ids": (N,), "support_logprobs": (N, K)}
    found = {
        "hidden": tuple(hidden.shape),
        "next_ids": tuple(targets.next_ids.shape),
        "support_logprobs": tuple(targets.signal.support_logprobs.shape),
    }
    if expected != found or not 0 < head.num_columns <= head.weight.shape[0]:
        raise ShapeError(
            f"sparse linear loss: shapes do not fit together\n  expected: {expected}, of {head.num_columns} columns\n"
            f"  found:    {found}, of {head.weight.shape[0]} columns"
        )
    if torch.float16 in (head.weight.dtype, hidden.dtype):
        raise ConfigError(
            "sparse linear loss: expected float32, bfloat16 or float64, found float16, whose small gradients vanish "
            "before a loss scale could save them; use bfloat16"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """What the autograd function needs besides the tensors it differentiates."""

    loss: LossSettings
    head: LinearHead
    targets: LinearTargets
    tile_bytes: int
    needs_gradient: bool


class _SparseLinearLoss(torch.autograd.Function):
    """Of (bias, features, weight, further features, further weight, …), the logits being the sum of their products."""

    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, bias: torch.Tensor | None, *factors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        device = factors[0].device
        wanted = [need and plan.needs_gradient for need in ctx.needs_input_grad[1:]]
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        with torch.autocast(device.type, enabled=False):
            total, (distillation, cross_entropy), ctx.gradients = _run_tiles(plan, bias, factors, wanted, autocast)
        ctx.mark_non_differentiable(distillation, cross_entropy)
        return total, distillation, cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("sparse linear loss: its gradients were handed out; run the forward pass again")
        gradients, ctx.gradients = ctx.gradients, None
        # A second pass over the head's gradient is worth avoiding, a wait for a GPU is not.
        if gradient.device.type != "cpu" or gradient.item() != 1.0:
            gradients = tuple(None if found is None else found.mul_(gradient) for found in gradients)
        return None, *gradients


def _run_tiles(
    plan: _Plan,
    bias: torch.Tensor | None,
    factors: tuple[torch.Tensor, ...],
    wanted: list[bool],
    autocast: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """Total, [2, N] losses, and the gradients of the bias and the factors that are wanted."""
    V, N = plan.head.num_columns, len(factors[0])
    terms = [
        HeadFactor(*pair, num_columns=V, wanted=(wanted[1 + 2 * index], wanted[2 + 2 * index]), autocast=autocast)
        for index, pair in enumerate(zip(factors[::2], factors[1::2], strict=True))
    ]
    values = torch.zeros(2, N, dtype=terms[0].wide_dtype, device=factors[0].device)
    total = values.new_zeros(())
    ranges = compute_row_ranges(N, V * values.element_size(), plan.tile_bytes)
    most_rows = max(map(len, ranges), default=0)
    tile = LogitsTile(plan.head, bias, terms, rows=most_rows, wants_bias=wanted[0])
    for row_range in ranges:
        rows = slice(row_range.start, row_range.stop)
        targets = plan.targets.select(rows)
        parts = tile.compute_parts(rows, targets.support_ids, targets.signal, targets.next_ids)
        distillation = compute_loss_and_gradient(plan.loss, parts, targets.signal)
        cross_entropy = compute_cross_entropy_form(parts, targets.signal)
        values[0, rows], values[1, rows] = distillation.value, cross_entropy.value
        form = distillation.scale(targets.distillation_weight.to(values.dtype)).add(
            cross_entropy.scale(targets.cross_entropy_weight.to(values.dtype))
        )
        total += form.value.sum()
        if any(wanted):
            tile.backpropagate(rows, form, targets.support_ids, targets.next_ids)
    return total, values, tile.finish()
