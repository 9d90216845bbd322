"""What one voice (a teacher's store, a student) says at the positions of sampled records, as columns of a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from logitstore.records import RecordBatch
from tools.store_report.numbers import encode_draws, encode_nats, encode_shares

# A candidate that is less likely is left out, but for the first one and the token that came next.
LEAST_PROBABILITY = 1e-2


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """M candidates of P positions, which stand together in order; the token that came next is one of each.

    Attributes:
        counts: [P] uint8, candidates of a position.
        next_slots: [P] uint8, which of them came next.
        token_ids: [M] int32.
        values: [M] uint16 codes of probabilities, or of how often a token was drawn.
        next_values: [P] uint16, code of the probability of the token that came next; 0 where `values` has the same.
    """

    counts: np.ndarray
    next_slots: np.ndarray
    token_ids: np.ndarray
    values: np.ndarray
    next_values: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Voice:
    """A voice at P positions. Codes are those of `tools.store_report.numbers`.

    Attributes:
        name: of the store's teacher or of the student.
        is_drawn: whether candidates may be drawn ones.
        candidates: at the positions.
        surprise, entropy: [P] uint16 codes of nats.
        tail: [P] uint16, code of the probability outside of the support, or of what is kept of it.
        kl: [P] uint16, code of nats, KL(first voice ‖ this one); None of the first.
    """

    name: str
    is_drawn: bool
    candidates: Candidates
    surprise: np.ndarray
    entropy: np.ndarray
    tail: np.ndarray
    kl: np.ndarray | None = None

    def list_columns(self) -> dict[str, np.ndarray]:
        """The columns that it has, by name."""
        columns = vars(self.candidates) | vars(self)
        return {name: value for name, value in columns.items() if isinstance(value, np.ndarray)}


def join_voices(parts: Sequence[Voice]) -> Voice:
    """One voice at the positions of several parts, in order."""
    candidates = [part.candidates for part in parts]
    joined = {
        field.name: np.concatenate([getattr(part, field.name) for part in candidates]) for field in fields(Candidates)
    }
    kls = [part.kl for part in parts if part.kl is not None]
    return replace(
        parts[0],
        candidates=Candidates(**joined),
        surprise=np.concatenate([part.surprise for part in parts]),
        entropy=np.concatenate([part.entropy for part in parts]),
        tail=np.concatenate([part.tail for part in parts]),
        kl=np.concatenate(kls) if kls else None,
    )


def build_voice(name: str, batch: RecordBatch, top: int, kl: np.ndarray | None = None) -> Voice:
    """What a store says at the positions of a batch.

    Args:
        name: of the voice.
        batch: of P positions.
        top: candidates at each position, beside the token that came next.
        kl: [P] float nats, from the first voice.
    """
    positions = np.repeat(np.arange(batch.num_positions), batch.support_counts)
    starts = np.cumsum(batch.support_counts, dtype=np.int64) - batch.support_counts
    slots = np.arange(len(positions)) - starts[positions]
    next_ids = find_next_ids(batch)
    probabilities = np.exp(batch.support_logprobs.astype(np.float64))
    values = encode_shares(probabilities)
    is_likely = (probabilities >= LEAST_PROBABILITY) | (slots == 0)
    if batch.support_draws is not None:
        is_draw = batch.support_draws > 0
        values = np.where(is_draw, encode_draws(batch.support_draws), values)
        is_likely |= is_draw
    shown = ((slots < top) & is_likely) | (batch.support_ids == next_ids[positions])
    next_values = encode_shares(np.exp(batch.next_token_logprob.astype(np.float64)))
    return Voice(
        name=name,
        is_drawn=batch.support_draws is not None,
        candidates=lay_out_candidates(positions[shown], batch.support_ids[shown], values[shown], next_ids, next_values),
        surprise=encode_nats(-batch.next_token_logprob.astype(np.float64)),
        entropy=encode_nats(batch.entropy),
        tail=encode_shares(np.exp(batch.tail_logprob.astype(np.float64))),
        kl=None if kl is None else encode_shares(kl),
    )


def find_next_ids(batch: RecordBatch) -> np.ndarray:
    """[P] int32, the token that came next at every position of a batch."""
    next_ids: np.ndarray = np.delete(batch.token_ids, batch.position_offsets[:-1] + np.arange(len(batch)))
    return next_ids


def lay_out_candidates(
    positions: np.ndarray, token_ids: np.ndarray, values: np.ndarray, next_ids: np.ndarray, next_values: np.ndarray
) -> Candidates:
    """Candidates with the tokens that came next behind them, where they are not among them.

    Args:
        positions: [N] int64, ascending, of each candidate.
        token_ids, values: [N] likewise.
        next_ids: [P] the token that came next at every position.
        next_values: [P] uint16, codes of their probabilities.
    """
    num_positions = len(next_ids)
    has_next = np.zeros(num_positions, dtype=bool)
    has_next[positions[token_ids == next_ids[positions]]] = True
    missing = np.flatnonzero(~has_next)
    order = np.argsort(np.concatenate([positions, missing]), kind="stable")
    positions = np.concatenate([positions, missing])[order]
    token_ids = np.concatenate([token_ids, next_ids[missing]])[order].astype(np.int32)
    values = np.concatenate([values, next_values[missing]])[order].astype(np.uint16)
    counts = np.bincount(positions, minlength=num_positions)
    places = np.flatnonzero(token_ids == next_ids[positions])
    return Candidates(
        counts=counts.astype(np.uint8),
        next_slots=(places - (np.cumsum(counts) - counts)).astype(np.uint8),
        token_ids=token_ids,
        values=values,
        next_values=np.where(values[places] == next_values, 0, next_values).astype(np.uint16),
    )
