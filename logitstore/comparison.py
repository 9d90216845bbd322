"""How far two stores' signals about the same positions lie apart.

A sparse signal says how likely the tokens of its support are, and how likely all others are together; of a token that
only the other one kept it says no more than that it is among these. So two signals do not determine a distance between
the distributions, and what is computed here is the least one that both allow: the full distributions are as far apart
or farther. Where both kept the same tokens it is the distance of supports and tails, and where the tails hold nothing
that of the distributions.

With C the tokens that both kept, a and b the masses of what only the first or only the second kept, t and s their
tails: the second has y ≤ s on the first's tokens a, and the first divides its tail between b and the rest as the second
does, so that KL(first ‖ second) is at least

    Σ_C p·log(p/q) + a·log(a/y) + t·log(t/(b + s − y)),    y = min(s, (b + s)·a/(a + t))

Of drawn supports only what was kept for its probability is a probability; drawn entries are part of the tail.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from logitstore.errors import ShapeError
from logitstore.records import RecordBatch


@dataclass(frozen=True, kw_only=True, eq=False)
class SignalDifferences:
    """The least distances that the signals of two stores allow, at P positions.

    Attributes:
        kl, reverse_kl: [P] float64 nats, KL(first ‖ second) and KL(second ‖ first); infinite where one holds impossible
            what the other does not.
        total_variation: [P] float64, half the sum of |p − q|.
        agrees: [P] bool, whether a token is the likeliest of both.
        is_comparable: [P] bool, whether both kept any token; where not, the others say nothing.
    """

    kl: np.ndarray
    reverse_kl: np.ndarray
    total_variation: np.ndarray
    agrees: np.ndarray
    is_comparable: np.ndarray


def compare_signals(first: RecordBatch, second: RecordBatch) -> SignalDifferences:
    """Distances between what two stores say of the same positions.

    Args:
        first, second: the same sequences in the same order, see `logitstore.store.aligned_stores`.
    Raises:
        ShapeError: they have different numbers of positions.
    """
    num_positions = first.num_positions
    if second.num_positions != num_positions:
        raise ShapeError(
            f"signals: expected {num_positions} positions in both, found {second.num_positions} in the second"
        )
    one, two = _read_kept(first), _read_kept(second)
    _, places_one, places_two = np.intersect1d(one.keys, two.keys, assume_unique=True, return_indices=True)
    position = one.positions[places_one]
    p, tail_p, only_p = _scale(one, first.tail_logprob, places_one)
    q, tail_q, only_q = _scale(two, second.tail_logprob, places_two)
    gains = np.bincount(position, weights=np.maximum(p - q, 0.0), minlength=num_positions)
    is_likeliest = one.find_likeliest()[places_one] & two.find_likeliest()[places_two]
    return SignalDifferences(
        # Of equal distributions the sums come out a rounding above or below 0.
        kl=np.maximum(_sum_up(p, q, position, num_positions) + _find_least_rest(only_p, tail_p, only_q, tail_q), 0.0),
        reverse_kl=np.maximum(
            _sum_up(q, p, position, num_positions) + _find_least_rest(only_q, tail_q, only_p, tail_p), 0.0
        ),
        total_variation=gains
        + np.maximum(only_p - tail_q, 0.0)
        + np.maximum(np.maximum(tail_p - only_q, 0.0) - np.maximum(tail_q - only_p, 0.0), 0.0),
        agrees=np.bincount(position[is_likeliest], minlength=num_positions) > 0,
        is_comparable=(one.counts > 0) & (two.counts > 0),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Kept:
    """The M entries of P positions that are kept for their probabilities."""

    keys: np.ndarray  # [M] int64, position and token
    positions: np.ndarray  # [M] int64
    probs: np.ndarray  # [M] float64
    counts: np.ndarray  # [P] int64

    def find_likeliest(self) -> np.ndarray:
        """[M] bool, whether no entry of the position is likelier."""
        largest = np.zeros(len(self.counts))
        filled = self.counts > 0
        starts = (np.cumsum(self.counts) - self.counts)[filled]
        largest[filled] = np.maximum.reduceat(self.probs, starts) if len(starts) else 0.0
        likeliest: np.ndarray = self.probs == largest[self.positions]
        return likeliest


def _read_kept(batch: RecordBatch) -> _Kept:
    positions = np.repeat(np.arange(batch.num_positions), batch.support_counts)
    ids, logprobs = batch.support_ids, batch.support_logprobs
    if batch.support_draws is not None:
        is_kept = batch.support_draws == 0
        positions, ids, logprobs = positions[is_kept], ids[is_kept], logprobs[is_kept]
    return _Kept(
        keys=positions << 32 | ids.astype(np.int64),
        positions=positions,
        probs=np.exp(logprobs.astype(np.float64)),
        counts=np.bincount(positions, minlength=batch.num_positions),
    )


def _scale(kept: _Kept, tail_logprob: np.ndarray, common: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities that sum to 1, which rounding keeps stored ones from.

    Returns:
        [·] of the entries at the places `common`; [P] of the tail; [P] of all other entries.
    """
    num_positions = len(kept.counts)
    is_other = np.ones(len(kept.keys), dtype=bool)
    is_other[common] = False
    tail = np.exp(tail_logprob.astype(np.float64))
    others = np.bincount(kept.positions[is_other], weights=kept.probs[is_other], minlength=num_positions)
    totals = tail + np.bincount(kept.positions, weights=kept.probs, minlength=num_positions)
    totals[totals == 0] = 1.0
    scaled: np.ndarray = kept.probs[common] / totals[kept.positions[common]]
    return scaled, tail / totals, others / totals


def _sum_up(p: np.ndarray, q: np.ndarray, position: np.ndarray, num_positions: int) -> np.ndarray:
    """[P] float64 nats, sums of p·log(p/q) over the common entries."""
    sums: np.ndarray = np.bincount(position, weights=_compute_terms(p, q), minlength=num_positions)
    return sums


def _find_least_rest(only_p: np.ndarray, tail_p: np.ndarray, only_q: np.ndarray, tail_q: np.ndarray) -> np.ndarray:
    """[P] float64 nats, the least that what is not common adds to KL(p ‖ q)."""
    rest_p = only_p + tail_p
    share = np.divide(only_p, rest_p, out=np.zeros_like(rest_p), where=rest_p > 0)
    of_only_p = np.minimum(tail_q, share * (only_q + tail_q))
    least: np.ndarray = _compute_terms(only_p, of_only_p) + _compute_terms(tail_p, only_q + tail_q - of_only_p)
    return least


def _compute_terms(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """p·log(p/q), 0 where p is 0, infinite where only q is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms: np.ndarray = np.where(p > 0, p * np.log(p / q), 0.0)
    return terms
