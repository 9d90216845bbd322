"""What is kept of a distribution: the support, its tail, and three scalars, from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from logitstore.errors import TeacherError
from logitstore.teacher.protocol import Method

# exp() of less is 0 in float32, and 0 * -150 is 0 where 0 * -inf is not a number.
_LOWEST_EXPONENT = -150.0
# Below the maximum by more than this, a tail is summed around its own maximum: float32 exponentials lose digits from
# -87 on, and what lies 37 below the tail's maximum does not count.
_DEEP_TAIL = 50.0
# Some models mask ids with finite numbers, float32's lowest for one. No logit that is meant lies so far below the
# others, and no codec need hold such values.
_MASKED_NATS = 1e4


class InvalidLogitsError(TeacherError):
    """Logits that are no distribution; `row` is the first such row."""

    def __init__(self, row: int, found: str) -> None:
        super().__init__(f"row {row}: expected finite logits, found {found}")
        self.row = row
        self.found = found


@dataclass(frozen=True, kw_only=True)
class SparseRows:
    """R distributions, each cut to its support.

    Attributes:
        counts: [R] int64, entries of the support; slots from there on are padding.
        ids: [R, K] int64 token ids, likeliest first; among equals the order is torch.topk's, which promises none.
        logprobs: [R, K] float32, nats, normalized over all V entries.
        tail_logprob: [R] float32, nats; -inf when nothing outside the support has any probability.
        entropy: [R] float32, nats, of the whole distribution.
        next_token_logprob: [R] float32, nats; -inf for a token of probability 0.
    """

    counts: torch.Tensor
    ids: torch.Tensor
    logprobs: torch.Tensor
    tail_logprob: torch.Tensor
    entropy: torch.Tensor
    next_token_logprob: torch.Tensor


def sparsify(logits_RV: torch.Tensor, next_ids: torch.Tensor, method: Method) -> SparseRows:
    """Support, tail and scalars of each row.

    Sums run in float32, relative to the row's maximum, and the tail is summed over the entries outside the support: the
    difference 1 - sum(support) would have no digits left where the support holds nearly all the mass.

    Args:
        logits_RV: [R, V] any floating dtype; -inf is a token that cannot come, and enters no support.
        next_ids: [R] int64 in [0, V).
        method: how many entries to keep; k is cut to V.
    Raises:
        InvalidLogitsError: a row holds NaN or +inf, or nothing but -inf.
    """
    logits_RV = logits_RV.float()
    k = min(method.k, logits_RV.shape[-1])
    # One more than is kept, since that is the maximum of the tail.
    top_logits, top_ids = torch.topk(logits_RV, min(k + 1, logits_RV.shape[-1]), dim=-1)
    ids, maximum = top_ids[:, :k], top_logits[:, :1]
    top_logits = _drop_masked(top_logits, maximum)
    slot_exponents = top_logits[:, :k] - maximum
    slot_masses = slot_exponents.exp()
    rest_exponents_RV = (logits_RV - maximum).clamp_(min=_LOWEST_EXPONENT)
    rest_masses_RV = rest_exponents_RV.exp().scatter_(1, ids, 0.0)
    rest_mass = rest_masses_RV.sum(-1)

    # The likeliest entry has mass 1 here; log1p keeps the digits of the others where they are few.
    log_sum = torch.log1p(slot_masses[:, 1:].sum(-1) + rest_mass)
    _check_rows(log_sum + maximum[:, 0], logits_RV)
    logprobs = slot_exponents - log_sum[:, None]
    counts = _count_support(logprobs, method)
    is_kept = torch.arange(k, device=ids.device) < counts[:, None]
    tail_mass = rest_mass + slot_masses.masked_fill(is_kept, 0.0).sum(-1)
    tail_maximum = torch.nn.functional.pad(top_logits, (0, 1), value=-math.inf).gather(1, counts[:, None])
    log_tail = tail_mass.log()
    is_deep = ((maximum - tail_maximum)[:, 0] > _DEEP_TAIL) & tail_maximum[:, 0].isfinite()
    if is_deep.any():
        log_tail[is_deep] = _sum_deep_tail(logits_RV[is_deep], ids[is_deep], is_kept[is_deep]) - maximum[is_deep, 0]
    weighted = (slot_masses * slot_exponents.clamp(min=_LOWEST_EXPONENT)).sum(-1)
    weighted += rest_masses_RV.mul_(rest_exponents_RV).sum(-1)
    return SparseRows(
        counts=counts,
        ids=ids,
        logprobs=logprobs,
        tail_logprob=log_tail - log_sum,
        entropy=(log_sum - weighted / log_sum.exp()).clamp_(min=0.0),
        next_token_logprob=(_drop_masked(logits_RV.gather(1, next_ids[:, None]), maximum) - maximum)[:, 0] - log_sum,
    )


def _drop_masked(logits: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    """Logits so far below the row's maximum that only a mask puts them there become -inf; their mass is 0 anyway."""
    return logits.masked_fill(logits < maximum - _MASKED_NATS, -math.inf)


def _count_support(logprobs: torch.Tensor, method: Method) -> torch.Tensor:
    """[R] int64: slots kept of [R, K] logprobs in falling order."""
    counts = torch.full(logprobs.shape[:1], logprobs.shape[1], dtype=torch.int64, device=logprobs.device)
    if method.top_p is not None:
        # Up to and including the first slot where the mass so far reaches top_p.
        reached = logprobs.double().exp().cumsum(-1) >= method.top_p
        counts = torch.minimum(counts, (~reached).sum(-1) + 1)
        counts.clamp_(min=min(method.min_k, logprobs.shape[1]))
    return torch.minimum(counts, logprobs.isfinite().sum(-1))


def _sum_deep_tail(logits_RV: torch.Tensor, ids: torch.Tensor, is_kept: torch.Tensor) -> torch.Tensor:
    """[R] logsumexp over what is not kept, around its own maximum."""
    kept_out = logits_RV.gather(1, ids).masked_fill(is_kept, -math.inf)
    return logits_RV.scatter(1, ids, kept_out).logsumexp(-1)


def _check_rows(logsumexp: torch.Tensor, logits_RV: torch.Tensor) -> None:
    is_finite = logsumexp.isfinite()
    if is_finite.all():
        return
    row = int((~is_finite).int().argmax())
    logits = logits_RV[row]
    if logits.isnan().any():
        raise InvalidLogitsError(row, f"NaN at id {int(logits.isnan().int().argmax())}")
    if logits.isposinf().any():
        raise InvalidLogitsError(row, f"+inf at id {int(logits.isposinf().int().argmax())}")
    raise InvalidLogitsError(row, "no id of finite logit")
