"""Bucket KL and cross-entropy of one pass over the logits, with a gradient written by hand.

Autograd through the definitions in `divergences.py` keeps about five tensors of the logits' size alive. Here one is
kept, in float32, and the gradient is written over it.

Every loss on the K + 1 parts has the gradient dL/dz_j = A q_j + B_j [j in S], with one number A and K numbers B per
position. With m = r, the teacher's tail mass (0 where the student's tail is at its floor), and P the teacher's mass
on the support:

    cross-entropy:  A = 1,               B_j = -[j = y]  (y need not be in S)
    bucket KL:      A = P + m - m / q_r, B_j = (m / q_r) q_j - p_j
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from trainer.loss.divergences import TAIL_LOGPROB_FLOOR


def compute_sparse_losses(
    student_logits: torch.Tensor,
    next_ids: torch.Tensor,
    support_ids: torch.Tensor,
    support_logprobs: torch.Tensor,
    tail_logprob: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`bucket_forward_kl` and `cross_entropy` of `divergences.py`, together.

    The tail's mass is summed rather than taken as what the support leaves, so it is exact however small it is. Can be
    differentiated once.

    Args:
        student_logits: [B, T, V] float, any precision; reduced in float32, or float64 where they are float64.
        next_ids: [B, T] int64.
        support_ids: [B, T, K] int64, no repeats among the filled slots.
        support_logprobs: [B, T, K] float, nats; -inf marks an empty slot.
        tail_logprob: [B, T] float, nats; -inf when the support holds all the mass.

    Returns:
        [B, T] float, nats, the bucket KL; [B, T] float, nats, the cross-entropy.
    """
    kl, cross_entropy = _SparseLosses.apply(  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        student_logits, next_ids, support_ids, support_logprobs, tail_logprob
    )
    return kl, cross_entropy


class _SparseLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        next_ids: torch.Tensor,
        support_ids: torch.Tensor,
        support_logprobs: torch.Tensor,
        tail_logprob: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        maximum = logits.amax(-1, keepdim=True).to(dtype)
        weights = logits.to(dtype, copy=True).sub_(maximum).exp_()  # the one copy of [B, T, V]
        is_filled = support_logprobs > -math.inf
        slot_weights = weights.gather(-1, support_ids) * is_filled
        # Multiplying by 0 or 1 empties the support and leaves the id alone that stands in empty slots.
        weights.scatter_reduce_(-1, support_ids, (~is_filled).to(dtype), "prod")
        tail_weight = weights.sum(-1)
        total = tail_weight + slot_weights.sum(-1)
        logsumexp = maximum.squeeze(-1) + total.log()

        student_slots = logits.gather(-1, support_ids).to(dtype) - logsumexp.unsqueeze(-1)
        student_tail = (tail_weight / total).log()
        probs, tail_mass = support_logprobs.to(dtype).exp(), tail_logprob.to(dtype).exp()
        slot_terms = torch.where(is_filled, probs * (support_logprobs - student_slots), 0.0)
        tail_term = tail_mass * (tail_logprob - student_tail.clamp(min=TAIL_LOGPROB_FLOOR))
        kl = slot_terms.sum(-1) + torch.where(tail_mass > 0, tail_term, 0.0)
        next_logits = logits.gather(-1, next_ids.unsqueeze(-1)).squeeze(-1).to(dtype)

        tail_mass = torch.where(student_tail > TAIL_LOGPROB_FLOOR, tail_mass, 0.0)  # a constant has no gradient
        ctx.save_for_backward(weights, slot_weights, tail_weight, probs, tail_mass, next_ids, support_ids)
        ctx.logits_dtype = logits.dtype
        return kl, logsumexp - next_logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kl_gradient, ce_gradient = gradients
        weights, slot_weights, tail_weight, probs, tail_mass, next_ids, support_ids = ctx.saved_tensors
        total = tail_weight + slot_weights.sum(-1)
        mass = probs.sum(-1) + tail_mass
        # m / q_r * total, the total being the one that turns weights into q below.
        tail_ratio = torch.where(tail_mass > 0, tail_mass * total / tail_weight, 0.0)
        on_tail = (kl_gradient * (mass - tail_ratio) + ce_gradient) / total
        on_slots = ((kl_gradient * mass + ce_gradient) / total).unsqueeze(-1)
        # In place: the logits' gradient takes over the memory, and a second backward fails instead of being wrong.
        logits_gradient = weights.mul_(on_tail.unsqueeze(-1))
        logits_gradient.scatter_add_(-1, support_ids, on_slots * slot_weights - kl_gradient.unsqueeze(-1) * probs)
        logits_gradient.scatter_add_(-1, next_ids.unsqueeze(-1), -ce_gradient.unsqueeze(-1))
        return logits_gradient.to(ctx.logits_dtype), None, None, None, None
