"""How far two tellings of the same distributions are apart, in float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from logitstore.errors import ShapeError
from logitstore.settings import Settings

# Below every tail that matters, and above what 1 - sum(p) can tell from 0 in float64.
_SMALLEST_TAIL = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class Distributions:
    """P distributions cut to their supports.

    Attributes:
        counts: [P] integers, entries of each.
        ids: [N] integers, no repeats within a position.
        logprobs: [N] float nats.
        tail_logprob: [P] float nats; None where it is not told, and all that the entries leave is the tail.
    """

    counts: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    tail_logprob: np.ndarray | None = None


class Agreement(Settings):
    """What a comparison found.

    Attributes:
        positions, entries: compared.
        largest_error: of a logprob, nats.
        mean_kl, largest_kl: KL(expected || found) of support and tail as one more entry, nats.
        beyond_bound: entries whose error is above what was allowed; None where nothing is promised.
        first_beyond_bound: where the first of them is.
    """

    positions: int = 0
    entries: int = 0
    largest_error: float = 0.0
    mean_kl: float = 0.0
    largest_kl: float = 0.0
    beyond_bound: int | None = None
    first_beyond_bound: str | None = None


def compare(
    expected: Distributions, found: Distributions, allowed: np.ndarray | None = None, *, where: str = ""
) -> Agreement:
    """Compare distributions position by position; entries are matched by id, whatever their order.

    Args:
        expected: what should be there.
        found: what is there.
        allowed: [N] nats, the largest error of each logprob of `expected`; None compares without judging.
        where: names the positions in the result.
    Raises:
        ShapeError: the supports are not the same.
    """
    if not np.array_equal(expected.counts, found.counts):
        raise ShapeError(f"{where}: expected as many entries at every position as were written, found others")
    mine = theirs = np.arange(len(expected.ids))
    if not np.array_equal(expected.ids, found.ids):
        mine, theirs = _order_by_id(expected), _order_by_id(found)
    if not np.array_equal(expected.ids[mine], found.ids[theirs]):
        raise ShapeError(f"{where}: expected the ids that were written, found others")
    position = np.repeat(np.arange(len(expected.counts)), expected.counts)
    values = expected.logprobs[mine].astype(np.float64)
    others = found.logprobs[theirs].astype(np.float64)
    error = np.abs(values - others)
    kl = _compute_kl(expected, found, values, others, position)
    beyond = None if allowed is None else ~(error <= allowed[mine])
    first = None
    if beyond is not None and beyond.any():
        entry = int(np.argmax(beyond))
        first = f"{where}, position {int(position[entry])}: expected {values[entry]:.9g}, found {others[entry]:.9g}"
    return Agreement(
        positions=len(expected.counts),
        entries=len(values),
        largest_error=float(error.max(initial=0.0)),
        mean_kl=float(kl.mean()) if len(kl) else 0.0,
        largest_kl=float(kl.max(initial=0.0)),
        beyond_bound=None if beyond is None else int(beyond.sum()),
        first_beyond_bound=first,
    )


def join(agreements: Iterable[Agreement]) -> Agreement:
    """All comparisons as one."""
    parts = list(agreements)
    positions = sum(part.positions for part in parts)
    judged = [part.beyond_bound for part in parts if part.beyond_bound is not None]
    return Agreement(
        positions=positions,
        entries=sum(part.entries for part in parts),
        largest_error=max((part.largest_error for part in parts), default=0.0),
        mean_kl=sum(part.mean_kl * part.positions for part in parts) / max(1, positions),
        largest_kl=max((part.largest_kl for part in parts), default=0.0),
        beyond_bound=sum(judged) if judged else None,
        first_beyond_bound=next((part.first_beyond_bound for part in parts if part.first_beyond_bound), None),
    )


def _order_by_id(distributions: Distributions) -> np.ndarray:
    position = np.repeat(np.arange(len(distributions.counts)), distributions.counts)
    return np.lexsort((distributions.ids, position))


def _compute_kl(
    expected: Distributions, found: Distributions, values: np.ndarray, others: np.ndarray, position: np.ndarray
) -> np.ndarray:
    """[P] nats, both sides brought to a sum of exactly 1 first: rounding would show up as a KL otherwise."""
    num_positions = len(expected.counts)
    tail, other_tail = (_read_tail(side, position) for side in (expected, found))

    def total(weights: np.ndarray) -> np.ndarray:
        return np.bincount(position, weights=weights, minlength=num_positions)

    log_sum = np.log(total(np.exp(values)) + tail)
    other_log_sum = np.log(total(np.exp(others)) + other_tail)
    probs = np.exp(values - log_sum[position])
    kl = total(probs * (values - log_sum[position] - others + other_log_sum[position]))
    tail_share, other_share = tail / np.exp(log_sum), other_tail / np.exp(other_log_sum)
    has_tail = tail_share > _SMALLEST_TAIL
    ratio = np.where(has_tail, tail_share, 1.0) / np.where(has_tail, np.maximum(other_share, _SMALLEST_TAIL), 1.0)
    kl += tail_share * np.log(ratio)
    clipped: np.ndarray = np.maximum(kl, 0.0)
    return clipped


def _read_tail(side: Distributions, position: np.ndarray) -> np.ndarray:
    tail: np.ndarray
    if side.tail_logprob is None:
        mass = np.bincount(position, weights=np.exp(side.logprobs.astype(np.float64)), minlength=len(side.counts))
        tail = np.maximum(1.0 - mass, 0.0)
    else:
        tail = np.exp(side.tail_logprob.astype(np.float64))
    return tail
