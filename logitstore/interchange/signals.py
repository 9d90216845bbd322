"""The signal of a sequence from what a data set says of it: checked, ordered, and with the tail that is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from logitstore.interchange.rows import ForeignSequence, RejectedRowError
from logitstore.records import Signal

Normalization: TypeAlias = Literal["vocabulary", "support"]

# A logprob above 0 by no more is one that rounding put there.
_LOGPROB_SLACK = 1e-3


@dataclass(frozen=True, kw_only=True)
class SignalRules:
    """How logprobs are read.

    Attributes:
        vocab_size: ids are below it.
        top_k: entries that are kept of a position; what is cut off goes into the tail.
        normalization: whether the probabilities of the whole vocabulary sum to 1, so that the tail is what the entries
            leave; or those of the entries, so that nothing is known of the tail and it is taken for empty.
        mass_tolerance: how far a sum may be above 1 ("support": off 1), to be scaled back.
    """

    vocab_size: int
    top_k: int
    normalization: Normalization
    mass_tolerance: float


def build_signal(sequence: ForeignSequence, rules: SignalRules) -> Signal:
    """The signal of a sequence. Entropies are unknown (NaN), and so are next tokens outside of the support.

    Raises:
        RejectedRowError: an id is outside the vocabulary or repeated, a value is no logprob, or a sum is too large.
    """
    _check_values(sequence, rules.vocab_size)
    position, ids, logprobs = _sort(sequence)
    _check_repeats(sequence, position, ids)
    mass = np.bincount(position, weights=np.exp(logprobs), minlength=len(sequence.counts))
    shift = _compute_shift(sequence, mass, rules)
    logprobs -= shift[position]
    slots = np.arange(len(ids)) - np.repeat(np.cumsum(sequence.counts) - sequence.counts, sequence.counts)
    is_kept = slots < rules.top_k
    position, ids, logprobs = position[is_kept], ids[is_kept], np.minimum(logprobs[is_kept], 0.0)
    kept_mass = np.bincount(position, weights=np.exp(logprobs), minlength=len(sequence.counts))
    counts = np.minimum(sequence.counts, rules.top_k)
    has_no_tail = (shift > 0) | (rules.normalization == "support")
    has_no_tail &= (sequence.counts <= rules.top_k) & (sequence.counts > 0)
    return Signal(
        support_counts=counts.astype(np.int32),
        support_ids=ids.astype(np.int32),
        support_logprobs=logprobs.astype(np.float32),
        tail_logprob=_compute_tail(kept_mass, has_no_tail),
        entropy=np.full(len(counts), np.nan, dtype=np.float32),
        next_token_logprob=_find_next_tokens(sequence.token_ids[1:], position, ids, logprobs),
    )


def compute_masses(sequence: ForeignSequence) -> np.ndarray:
    """[P'] float64, sums of the probabilities at the positions that have entries."""
    position = np.repeat(np.arange(len(sequence.counts)), sequence.counts)
    with np.errstate(over="ignore"):
        probs = np.exp(sequence.logprobs.astype(np.float64))
    return np.bincount(position, weights=probs, minlength=len(sequence.counts))[sequence.counts > 0]


def _check_values(sequence: ForeignSequence, vocab_size: int) -> None:
    for what, ids in (("token", sequence.token_ids), ("entry", sequence.ids)):
        outside = (ids < 0) | (ids >= vocab_size)
        if outside.any():
            first = int(np.argmax(outside))
            if what == "entry":
                where = f"position {_find_position(sequence, first)}"
            else:
                where = f"token {sequence.offset + first}"
            raise RejectedRowError(
                "token_out_of_range", f"{where}: expected ids below {vocab_size}, found {int(ids[first])}"
            )
    bad = ~(sequence.logprobs <= _LOGPROB_SLACK)
    if bad.any():
        first = int(np.argmax(bad))
        raise RejectedRowError(
            "invalid_signal",
            f"position {_find_position(sequence, first)}: expected logprobs, found {float(sequence.logprobs[first])}",
        )


def _find_position(sequence: ForeignSequence, entry: int) -> int:
    return sequence.offset + int(np.searchsorted(np.cumsum(sequence.counts), entry, side="right"))


def _sort(sequence: ForeignSequence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position, id and float64 logprob of every entry, likeliest first at each position."""
    position = np.repeat(np.arange(len(sequence.counts)), sequence.counts)
    logprobs = sequence.logprobs.astype(np.float64)
    if not ((np.diff(logprobs) > 0) & (np.diff(position) == 0)).any():  # as nearly every data set is
        return position, sequence.ids, logprobs
    order = np.lexsort((-logprobs, position))
    return position, sequence.ids[order], logprobs[order]


def _check_repeats(sequence: ForeignSequence, position: np.ndarray, ids: np.ndarray) -> None:
    """Ids have been found to lie in the vocabulary, below 2^31."""
    keys = np.sort(position * np.int64(1 << 32) + ids)
    repeated = np.diff(keys) == 0
    if repeated.any():
        first, token_id = divmod(int(keys[int(np.argmax(repeated))]), 1 << 32)
        raise RejectedRowError(
            "invalid_signal", f"position {sequence.offset + first}: expected every id once, found {token_id} twice"
        )


def _compute_shift(sequence: ForeignSequence, mass: np.ndarray, rules: SignalRules) -> np.ndarray:
    """[P] float64 nats to take off the logprobs, so that no sum is above 1 or, over supports, any other than 1."""
    is_support, is_filled = rules.normalization == "support", sequence.counts > 0
    bad = is_filled & (mass > 1 + rules.mass_tolerance)
    if is_support:
        bad |= is_filled & (mass < 1 - rules.mass_tolerance)
    if bad.any():
        first = int(np.argmax(bad))
        expected = "of 1" if is_support else "of at most 1"
        raise RejectedRowError(
            "invalid_signal",
            f"position {sequence.offset + first}: expected probabilities with a sum {expected}, "
            f"found {mass[first]:.6g}",
        )
    needs_shift = is_filled & ((mass > 1) | is_support)
    return np.where(needs_shift, np.log(np.where(needs_shift, mass, 1.0)), 0.0)


def _compute_tail(kept_mass: np.ndarray, has_no_tail: np.ndarray) -> np.ndarray:
    """[P] float32 log of what the kept entries leave."""
    left = np.where(has_no_tail, 0.0, np.maximum(1.0 - kept_mass, 0.0))
    with np.errstate(divide="ignore"):
        return np.log(left).astype(np.float32)


def _find_next_tokens(next_ids: np.ndarray, position: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
    """[P] float32 logprob of the next token where the support holds it, else NaN."""
    found = np.full(len(next_ids), np.nan, dtype=np.float32)
    is_next = ids == next_ids[position]
    found[position[is_next]] = logprobs[is_next]
    return found
