"""The partial derivatives of every loss in the student's logprobs of slots, tail and next token."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from logitstore.errors import ConfigError
from trainer.loss.divergences import TAIL_LOGPROB_FLOOR
from trainer.loss.parts import SignalTensors, StudentParts
from trainer.loss.settings import LossSettings

# Value [N], and the derivatives in log q of the K slots [N, K], of the tail [N] and of the next token [N]. In empty
# slots the derivatives may be anything. A constant times the probability of every part may be missing from the
# derivatives: the parts always sum to 1, so it has no effect.
Partials = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

# Of log p and log q of one part: its term of a divergence, and the derivative of the term in log q.
_Terms = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def compute_partials(loss: LossSettings, parts: StudentParts, signal: SignalTensors) -> Partials:
    """Value and derivatives of a loss at N positions, in the dtype of `parts`.

    Raises:
        ConfigError: `weighted_cross_entropy` of a signal without target weights.
    """
    dtype = parts.slot_logprobs.dtype
    log_p, log_r = signal.support_logprobs.to(dtype), signal.tail_logprob.to(dtype)
    log_q, log_q_r = parts.slot_logprobs, parts.tail_logprob.clamp(min=TAIL_LOGPROB_FLOOR)
    match loss.kind:
        case "bucket_kl":
            return _sum_parts(_forward_kl, log_p, log_q, log_r, log_q_r)
        case "reverse_kl":
            return _sum_parts(_reverse_kl, log_p, log_q, log_r.clamp(min=TAIL_LOGPROB_FLOOR), log_q_r)
        case "jensen_shannon":
            return _sum_parts(_build_jensen_shannon(loss.beta), log_p, log_q, log_r, log_q_r)
        case "skew_kl":
            return _sum_parts(_build_skew_kl(loss.alpha), log_p, log_q, log_r, log_q_r)
        case "total_variation":
            return _sum_parts(_total_variation, log_p, log_q, log_r, log_q_r)
        case "top_k_kl":
            return _differ_on_support(log_p, log_q)
        case "renormalized_kl":
            return _differ_on_support(log_p - log_p.logsumexp(-1, keepdim=True), log_q)
        case "residual":
            return _add_residual(log_p, log_q, log_r, parts.next_logprob)
        case "decoupled":
            return _decouple(log_p, log_q, log_r, log_q_r, loss.temperature)
        case "weighted_cross_entropy":
            return _weigh(signal.support_weights, log_q)
        case "cross_entropy":
            nothing = torch.zeros_like(parts.next_logprob)
            return -parts.next_logprob, torch.zeros_like(log_q), nothing, nothing - 1


def _sum_parts(
    terms: _Terms, log_p: torch.Tensor, log_q: torch.Tensor, log_r: torch.Tensor, log_q_r: torch.Tensor
) -> Partials:
    """A divergence that is a sum over the K + 1 parts."""
    slots, on_slots = terms(log_p, log_q)
    tail, on_tail = terms(log_r, log_q_r)
    value = torch.where(log_p > -math.inf, slots, 0.0).sum(-1) + tail
    return value, on_slots, on_tail, torch.zeros_like(value)


def _forward_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0), -p


def _reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    term = log_q.exp() * (log_q - log_p)
    return term, term  # plus q, see `Partials`


def _build_jensen_shannon(beta: float) -> _Terms:
    log_beta, log_rest = math.log(beta), math.log1p(-beta)

    def jensen_shannon(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        p, log_mixture = log_p.exp(), torch.logaddexp(log_p + log_beta, log_q + log_rest)
        of_teacher = torch.where(p > 0, p * (log_p - log_mixture), 0.0)
        of_student = log_q.exp() * (log_q - log_mixture)
        return beta * of_teacher + (1 - beta) * of_student, (1 - beta) * of_student

    return jensen_shannon


def _build_skew_kl(alpha: float) -> _Terms:
    log_alpha, log_rest = math.log(alpha) if alpha > 0 else -math.inf, math.log1p(-alpha)

    def skew_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        p, log_mixture = log_p.exp(), torch.logaddexp(log_p + log_alpha, log_q + log_rest)
        share_of_student = (log_q + log_rest - log_mixture).exp()
        return torch.where(p > 0, p * (log_p - log_mixture), 0.0), -p * share_of_student

    return skew_kl


def _total_variation(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q = log_q.exp()
    difference = q - log_p.exp()
    return difference.abs() / 2, q * difference.sign() / 2


def _differ_on_support(log_p: torch.Tensor, log_q: torch.Tensor) -> Partials:
    """Sum over the support of p log(p / q); nothing about the tail."""
    slots, on_slots = _forward_kl(log_p, log_q)
    value = torch.where(log_p > -math.inf, slots, 0.0).sum(-1)
    nothing = torch.zeros_like(value)
    return value, on_slots, nothing, nothing


def _add_residual(log_p: torch.Tensor, log_q: torch.Tensor, log_r: torch.Tensor, log_q_y: torch.Tensor) -> Partials:
    p, tail_mass = log_p.exp(), log_r.exp()
    value = -torch.where(p > 0, p * log_q, 0.0).sum(-1) - tail_mass * log_q_y
    return value, -p, torch.zeros_like(value), -tail_mass


def _weigh(weights: torch.Tensor | None, log_q: torch.Tensor) -> Partials:
    if weights is None:
        raise ConfigError(
            "loss.kind: 'weighted_cross_entropy' needs the target weights of a sampled support, found a top-k signal "
            "without them; choose 'bucket_kl', or 'renormalized_kl' for renormalized top-k weights"
        )
    weights = weights.to(log_q.dtype)
    value = -torch.where(weights > 0, weights * log_q, 0.0).sum(-1)
    nothing = torch.zeros_like(value)
    return value, -weights, nothing, nothing


def _decouple(
    log_p: torch.Tensor, log_q: torch.Tensor, log_r: torch.Tensor, log_q_r: torch.Tensor, temperature: float
) -> Partials:
    is_filled = log_p > -math.inf
    has_support = is_filled.any(-1, keepdim=True)
    # Where there is no support, zeros stand in for it: finite, and of no mass.
    log_p, log_q = (torch.where(has_support, torch.where(is_filled, x, -math.inf), 0.0) for x in (log_p, log_q))
    teacher_mass, student_mass = log_p.logsumexp(-1, keepdim=True), log_q.logsumexp(-1, keepdim=True)
    P = torch.where(has_support, teacher_mass.exp(), 0.0)
    tempered_p, tempered_q = ((x / temperature).log_softmax(-1) for x in (log_p, log_q))
    difference = torch.where(is_filled, tempered_p.exp() * (tempered_p - tempered_q), 0.0).sum(-1)
    inside, _ = _forward_kl(teacher_mass, student_mass)
    tail, on_tail = _forward_kl(log_r, log_q_r)
    inside = torch.where(has_support, inside, 0.0).squeeze(-1)
    value = inside + tail + P.squeeze(-1) * temperature**2 * difference
    on_slots = P * (temperature * (tempered_q.exp() - tempered_p.exp()) - (log_q - student_mass).exp())
    return value, on_slots, on_tail, torch.zeros_like(value)
