"""Readable definitions of the losses that are no divergence of the K + 1 parts, differentiated by autograd.

Arguments that are not described are those of `bucket_forward_kl` in `divergences.py`.
"""

from __future__ import annotations

import math

import torch

from trainer.loss.divergences import compute_partition_logprobs, compute_relative_entropy_terms, cross_entropy


def weighted_cross_entropy(
    student_logits: torch.Tensor, support_ids: torch.Tensor, support_weights: torch.Tensor
) -> torch.Tensor:
    """-sum over the support of w log q: unbiased for the cross-entropy to the whole teacher where E[w] = p.

    That is so for the weights of `sample` (counts over draws) and of `head_tail` (p in the head, the tail's mass over
    its number of draws). Nothing is renormalized. Less the teacher's entropy it estimates the full KL; a single
    estimate may be below 0.

    Args:
        student_logits: [B, T, V] float.
        support_ids: [B, T, K] int64, no repeats among the filled slots.
        support_weights: [B, T, K] float, at least 0; 0 in empty slots.

    Returns:
        [B, T] float, nats.

    Source: Anshumann et al. 2025, arXiv:2503.16870.
    """
    slot_logprobs, _ = compute_partition_logprobs(student_logits, support_ids, support_weights.log())
    return -torch.where(support_weights > 0, support_weights.to(slot_logprobs.dtype) * slot_logprobs, 0.0).sum(-1)


def top_k_kl(student_logits: torch.Tensor, support_ids: torch.Tensor, support_logprobs: torch.Tensor) -> torch.Tensor:
    """Sum over the support of p log(p / q); nothing about the tail.

    Biased: its minimum is q = p / P on the support, P its mass, so the student grows more confident than the teacher.
    Here because it is widely used.

    Returns:
        [B, T] float, nats, at least P log P.
    """
    slot_logprobs, _ = compute_partition_logprobs(student_logits, support_ids, support_logprobs)
    return compute_relative_entropy_terms(support_logprobs.to(slot_logprobs.dtype), slot_logprobs).sum(-1)


def renormalized_kl(
    student_logits: torch.Tensor, support_ids: torch.Tensor, support_logprobs: torch.Tensor
) -> torch.Tensor:
    """KL of the teacher's support, scaled to sum to 1, to the student; biased like `top_k_kl`, same minimum.

    Returns:
        [B, T] float, nats, at least 0 but for rounding.
    """
    support_logprobs = support_logprobs.to(torch.promote_types(student_logits.dtype, torch.float32))
    has_support = (support_logprobs > -math.inf).any(-1, keepdim=True)
    mass_logprob = torch.where(has_support, support_logprobs.logsumexp(-1, keepdim=True), 0.0)
    return top_k_kl(student_logits, support_ids, support_logprobs - mass_logprob)


def residual_cross_entropy(
    student_logits: torch.Tensor,
    next_ids: torch.Tensor,
    support_ids: torch.Tensor,
    support_logprobs: torch.Tensor,
    tail_logprob: torch.Tensor,
) -> torch.Tensor:
    """Cross-entropy to the support's probabilities with the tail's mass added to the token that really comes next.

    A cheap repair for small supports: whatever the next token is drawn from fills the tail in the mean.

    Args:
        next_ids: [B, T] int64.

    Returns:
        [B, T] float, nats.
    """
    weights = support_logprobs.to(torch.promote_types(student_logits.dtype, torch.float32)).exp()
    of_support = weighted_cross_entropy(student_logits, support_ids, weights)
    return of_support + tail_logprob.to(of_support.dtype).exp() * cross_entropy(student_logits, next_ids)


def decoupled_kl(
    student_logits: torch.Tensor,
    support_ids: torch.Tensor,
    support_logprobs: torch.Tensor,
    tail_logprob: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """KL of (support, tail), plus P T^2 times the KL inside the support at temperature T.

    P is the teacher's mass on the support. At T = 1 this is `bucket_forward_kl`, by the chain rule of KL. The inner
    distributions are normalized over the support, where all logits are known, so any temperature is exact there.

    Returns:
        [B, T] float, nats, at least 0 but for rounding.

    Source: Liquid AI 2025, arXiv:2511.23404; T^2: Hinton et al. 2015, arXiv:1503.02531.
    """
    student_slots, student_tail = compute_partition_logprobs(student_logits, support_ids, support_logprobs)
    is_filled = support_logprobs > -math.inf
    # Zeros stand in for an empty support: finite numbers with finite gradients, which P = 0 then cancels.
    has_support = is_filled.any(-1, keepdim=True)
    log_p = torch.where(has_support, support_logprobs.to(student_slots.dtype), 0.0)
    log_q = student_slots.masked_fill(has_support & ~is_filled, -math.inf)
    log_P = torch.where(has_support.squeeze(-1), log_p.logsumexp(-1), -math.inf)

    outer = compute_relative_entropy_terms(log_P, log_q.logsumexp(-1)) + compute_relative_entropy_terms(
        tail_logprob.to(student_tail.dtype), student_tail
    )
    tempered_p, tempered_q = (log_p / temperature).log_softmax(-1), (log_q / temperature).log_softmax(-1)
    inner = compute_relative_entropy_terms(tempered_p, tempered_q.masked_fill(log_q == -math.inf, 0.0)).sum(-1)
    return outer + log_P.exp() * temperature**2 * inner
