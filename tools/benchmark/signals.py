"""Signals that benchmarks measure with: of the quickstart's teacher, or of a synthetic one; cut to fewer slots."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from logitstore.errors import ShapeError
from logitstore.records import DocumentSpan, Record, RecordAddress, RecordBatch, Signal
from logitstore.shard.compact import sum_positions
from logitstore.shard.drawn import take_kept

if TYPE_CHECKING:
    from collections.abc import Iterator

    from logitstore.teacher.protocol import Method

_QUICKSTART_LENGTH = 256


def build_quickstart_records(num_positions: int, method: Method) -> Iterator[Record]:
    """The quickstart teacher's signals, float32, on library source that it never saw; 256 positions each."""
    from logitstore.teacher.draw_key import build_draw_key
    from logitstore.teacher.loading import load_teacher
    from logitstore.teacher.protocol import TeacherSettings
    from tools.quickstart import TEACHER
    from tools.quickstart.corpus import build_stdlib_root, is_held_out, read_sources

    teacher = load_teacher(TeacherSettings(model=str(TEACHER), dtype="float32", device="cpu"), method)
    token_ids: list[int] = []
    for path, text in read_sources(build_stdlib_root()):
        if len(token_ids) > num_positions:
            break
        if is_held_out(path):
            token_ids += [*teacher.encode([text])[0], teacher.identity.end_of_text_id]
    ids = np.array(token_ids, dtype=np.int32)
    starts = range(0, min(num_positions, len(ids) - 1) - _QUICKSTART_LENGTH + 1, _QUICKSTART_LENGTH)
    sequences = [ids[start : start + _QUICKSTART_LENGTH + 1] for start in starts]
    keys = [build_draw_key(0, 0, index) for index in range(len(sequences))]
    for index, (sequence, signal) in enumerate(zip(sequences, teacher.score(sequences, keys), strict=True)):
        yield Record(
            address=RecordAddress(unit=0, index=index),
            token_ids=sequence,
            loss_mask=np.ones(_QUICKSTART_LENGTH, dtype=bool),
            signal=signal,
            documents=(DocumentSpan(document_id=f"stdlib@{index}", start=0, document_offset=0),),
        )


def cut_supports(records: list[Record], top_k: int) -> list[Record]:
    """Records as if they had been captured with a smaller k; their supports must all be equally long.

    Raises:
        ShapeError: supports were drawn: their first slots alone say nothing of the distribution.
    """
    if any(record.signal.support_draws is not None for record in records):
        raise ShapeError("records: expected supports of the likeliest ids to cut, found drawn ones; draw fewer instead")
    return [replace(record, signal=_cut(record, top_k)) for record in records]


def _cut(record: Record, top_k: int) -> Signal:
    signal = record.signal
    ids = signal.support_ids.reshape(signal.num_positions, -1)
    logprobs = signal.support_logprobs.reshape(ids.shape)
    dropped = np.exp(logprobs[:, top_k:].astype(np.float64)).sum(axis=1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(signal.tail_logprob.astype(np.float64)) + dropped)
    return replace(
        signal,
        support_counts=np.full(signal.num_positions, top_k, dtype=np.int32),
        support_ids=ids[:, :top_k].ravel(),
        support_logprobs=logprobs[:, :top_k].ravel(),
        tail_logprob=tail.astype(np.float32),
    )


def compute_kl(exact: RecordBatch, decoded: RecordBatch) -> np.ndarray:
    """[P] float64, KL of what was written to what is read, with the tail as one more entry.

    Slots are matched in order: codecs only exchange slots to which they give one value. Of drawn supports kept entries
    and tail are compared; the weights of drawn entries hang on the tail alone.
    """
    exact, decoded = take_kept(exact), take_kept(decoded)
    counts = exact.support_counts
    assert np.array_equal(counts, decoded.support_counts)
    logprobs, found = exact.support_logprobs.astype(np.float64), decoded.support_logprobs.astype(np.float64)
    kl = np.zeros(len(counts))
    kl[counts > 0] = sum_positions(np.exp(logprobs) * (logprobs - found), counts) if len(logprobs) else 0.0
    tail, found_tail = exact.tail_logprob.astype(np.float64), decoded.tail_logprob.astype(np.float64)
    has_tail = np.isfinite(tail)
    kl[has_tail] += (np.exp(tail) * (tail - found_tail))[has_tail]
    return kl


def compute_entropy_bits(symbols: np.ndarray) -> float:
    """Order-0 entropy of symbols, bits each."""
    counts = np.unique(symbols, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())
