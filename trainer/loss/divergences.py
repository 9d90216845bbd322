"""Readable definitions of the losses, in any float dtype, differentiated by autograd.

They define what the efficient forms beside them must return. All of them see the distributions of teacher (p) and
student (q) through the support S that the store keeps, with everything else merged into one bucket, the tail:
K + 1 parts that sum to 1. Student logits are already cut to the teacher's vocabulary.

A divergence of the parts is a lower bound of the divergence of the whole distributions, and equal to it when the
support is the vocabulary: merging ids can only bring two distributions closer (data-processing inequality). Forward KL
alone is linear in p but for a constant, so it alone can be estimated without bias from a sampled support. Losses that
are no divergence of the parts are in `support_losses.py`.
"""

from __future__ import annotations

import math

import torch

# A student's tail mass below this is taken to be this, which bounds the loss where the student has no tail at all.
# Logprobs of single ids need no floor: they are differences of finite logits.
TAIL_LOGPROB_FLOOR = -30.0


def widen(logits: torch.Tensor) -> torch.Tensor:
    """The logits in the dtype that reductions run in: float64 stays, everything else becomes float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def compute_partition_logprobs(
    student_logits: torch.Tensor, support_ids: torch.Tensor, support_logprobs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's logprobs of the K slots, and of everything outside the support.

    Args:
        student_logits: [B, T, V] float.
        support_ids: [B, T, K] int64, no repeats among the filled slots.
        support_logprobs: [B, T, K] float, nats; -inf marks an empty slot.

    Returns:
        [B, T, K] float, nats; in an empty slot the logprob of whatever id stands there.
        [B, T] float, nats, at least TAIL_LOGPROB_FLOOR.
    """
    logits = widen(student_logits)
    slot_logprobs = logits.gather(-1, support_ids) - logits.logsumexp(-1, keepdim=True)
    is_empty = support_logprobs == -math.inf
    support_logprob = slot_logprobs.masked_fill(is_empty, -math.inf).logsumexp(-1)
    # log(1 - Q) of Q = exp(support_logprob), through expm1 because 1 - exp cancels; Q = 1 gives the floor.
    tail_logprob = torch.log(-torch.expm1(support_logprob.clamp(max=-math.exp(TAIL_LOGPROB_FLOOR))))
    return slot_logprobs, tail_logprob


def bucket_forward_kl(
    student_logits: torch.Tensor,
    support_ids: torch.Tensor,
    support_logprobs: torch.Tensor,
    tail_logprob: torch.Tensor,
) -> torch.Tensor:
    """KL(teacher || student) with everything outside the support merged into one bucket.

    A lower bound of the full-vocabulary KL, and equal to it when the support is the vocabulary: what is missing is the
    tail's mass times the KL between the two tails.

    Args:
        student_logits: [B, T, V] float, any precision; reduced in float32, or float64 where they are float64.
        support_ids: [B, T, K] int64, no repeats among the filled slots.
        support_logprobs: [B, T, K] float, nats, normalized over all V ids; -inf marks an empty slot.
        tail_logprob: [B, T] float, nats; -inf when the support holds all the mass.

    Returns:
        [B, T] float, nats, at least 0 but for rounding. Not averaged: the caller owns masking and weighting.

    Source: Hinton et al. 2015, arXiv:1503.02531; bucket bound: log-sum inequality.
    """
    student_slots, student_tail = compute_partition_logprobs(student_logits, support_ids, support_logprobs)
    slots = compute_relative_entropy_terms(support_logprobs.to(student_slots.dtype), student_slots)
    return slots.sum(-1) + compute_relative_entropy_terms(tail_logprob.to(student_tail.dtype), student_tail)


def compute_relative_entropy_terms(teacher_logprobs: torch.Tensor, student_logprobs: torch.Tensor) -> torch.Tensor:
    """p * log(p / q) elementwise; exactly 0, with zero gradient, where p is 0."""
    has_mass = teacher_logprobs > -math.inf
    finite_logprobs = torch.where(has_mass, teacher_logprobs, 0.0)  # keeps NaN out of the gradient as well
    return torch.where(has_mass, finite_logprobs.exp() * (finite_logprobs - student_logprobs), 0.0)


def reverse_kl(
    student_logits: torch.Tensor,
    support_ids: torch.Tensor,
    support_logprobs: torch.Tensor,
    tail_logprob: torch.Tensor,
) -> torch.Tensor:
    """KL(student || teacher) over the K + 1 parts; arguments as for `bucket_forward_kl`.

    A teacher without tail is taken to have one of TAIL_LOGPROB_FLOOR, or a student with one would be infinitely far.

    Returns:
        [B, T] float, nats, at least 0 but for rounding; 0 where there is no signal.

    Source: Gu et al. 2023, arXiv:2306.08543.
    """
    teacher, student, is_part = _join_parts(student_logits, support_ids, support_logprobs, tail_logprob)
    teacher = torch.where(is_part, teacher.clamp(min=TAIL_LOGPROB_FLOOR), 0.0)
    return torch.where(is_part, student.exp() * (student - teacher), 0.0).sum(-1)


def jensen_shannon(
    student_logits: torch.Tensor,
    support_ids: torch.Tensor,
    support_logprobs: torch.Tensor,
    tail_logprob: torch.Tensor,
    beta: float = 0.5,
) -> torch.Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, over the K + 1 parts.

    Arguments as for `bucket_forward_kl`. Divided by beta it tends to the forward KL as beta goes to 0, divided by
    1 - beta to the reverse KL as beta goes to 1.

    Returns:
        [B, T] float, nats, in [0, log 2] but for rounding; 0 where there is no signal.

    Source: Agarwal et al. 2023, arXiv:2306.13649.
    """
    teacher, student, is_part = _join_parts(student_logits, support_ids, support_logprobs, tail_logprob)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    of_teacher = compute_relative_entropy_terms(teacher, mixture)
    of_student = student.exp() * (student - mixture)
    return torch.where(is_part, beta * of_teacher + (1 - beta) * of_student, 0.0).sum(-1)


def skew_kl(
    student_logits: torch.Tensor,
    support_ids: torch.Tensor,
    support_logprobs: torch.Tensor,
    tail_logprob: torch.Tensor,
    alpha: float = 0.1,
) -> torch.Tensor:
    """KL(p || alpha p + (1 - alpha) q) over the K + 1 parts; arguments as for `bucket_forward_kl`.

    Bounded by -log alpha, so no token that the student finds impossible dominates the gradient.

    Returns:
        [B, T] float, nats, at least 0 but for rounding.

    Source: Ko et al. 2024, arXiv:2402.03898.
    """
    teacher, student, _ = _join_parts(student_logits, support_ids, support_logprobs, tail_logprob)
    log_alpha = math.log(alpha) if alpha > 0 else -math.inf
    mixture = torch.logaddexp(teacher + log_alpha, student + math.log1p(-alpha))
    return compute_relative_entropy_terms(teacher, mixture).sum(-1)


def total_variation(
    student_logits: torch.Tensor,
    support_ids: torch.Tensor,
    support_logprobs: torch.Tensor,
    tail_logprob: torch.Tensor,
) -> torch.Tensor:
    """Half the sum of |p - q| over the K + 1 parts; arguments as for `bucket_forward_kl`.

    Returns:
        [B, T] float in [0, 1] but for rounding: 1 minus `bucket_overlap`; 0 where there is no signal.

    Source: Wen et al. 2023, arXiv:2307.15190.
    """
    teacher, student, is_part = _join_parts(student_logits, support_ids, support_logprobs, tail_logprob)
    return torch.where(is_part, (student.exp() - teacher.exp()).abs() / 2, 0.0).sum(-1)


def _join_parts(
    student_logits: torch.Tensor,
    support_ids: torch.Tensor,
    support_logprobs: torch.Tensor,
    tail_logprob: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logprobs of teacher and student, [B, T, K + 1] with the tail last, and which of them are parts.

    Empty slots are none, and neither is the tail where there is no signal at all.
    """
    student_slots, student_tail = compute_partition_logprobs(student_logits, support_ids, support_logprobs)
    teacher = torch.cat([support_logprobs, tail_logprob.unsqueeze(-1)], dim=-1).to(student_slots.dtype)
    student = torch.cat([student_slots, student_tail.unsqueeze(-1)], dim=-1)
    is_filled = support_logprobs > -math.inf
    has_signal = is_filled.any(-1) | (tail_logprob > -math.inf)
    return teacher, student, torch.cat([is_filled, has_signal.unsqueeze(-1)], dim=-1)


def bucket_overlap(
    student_logits: torch.Tensor,
    support_ids: torch.Tensor,
    support_logprobs: torch.Tensor,
    tail_logprob: torch.Tensor,
) -> torch.Tensor:
    """Sum over the K + 1 parts of min(p, q): 1 where teacher and student agree.

    An upper bound of the sum over single ids, which is the probability that speculative decoding accepts a token that
    the student drafts for the teacher. Arguments as for `bucket_forward_kl`.

    Returns:
        [B, T] float in [0, 1] but for rounding.

    Source: Leviathan et al. 2023, arXiv:2211.17192.
    """
    student_slots, student_tail = compute_partition_logprobs(student_logits, support_ids, support_logprobs)
    slots = torch.minimum(support_logprobs.to(student_slots.dtype), student_slots).exp().sum(-1)
    return slots + torch.minimum(tail_logprob.to(student_tail.dtype), student_tail).exp()


def cross_entropy(student_logits: torch.Tensor, next_ids: torch.Tensor) -> torch.Tensor:
    """-log q of the token that comes next.

    Args:
        student_logits: [B, T, V] float, any precision; reduced in float32, or float64 where they are float64.
        next_ids: [B, T] int64.

    Returns:
        [B, T] float, nats.
    """
    logits = widen(student_logits)
    return logits.logsumexp(-1) - logits.gather(-1, next_ids.unsqueeze(-1)).squeeze(-1)
