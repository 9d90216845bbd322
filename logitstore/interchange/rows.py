"""Rows of other tools' data sets: what a layout makes of them, and how their nested lists are read and built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from logitstore.corpus.documents import DeadLetterReason

# Layouts fill the slots that a position does not use with finite numbers, lest a loss compute 0 · -inf. Float16 holds
# none below -65504; exp of this is 0 in every precision.
PADDING_LOGPROB = -10_000.0


class RejectedRowError(Exception):
    """A row that cannot be used: caught where its place is known, and turned into a dead letter there."""

    def __init__(self, reason: DeadLetterReason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: DeadLetterReason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True, eq=False)
class ForeignSequence:
    """A sequence as a data set tells it, nothing checked but lengths; position t speaks about token t + 1.

    Attributes:
        token_ids: [T + 1] int64.
        loss_mask: [T] bool.
        counts: [T] int64, entries at each position.
        ids: [N] int64 token ids.
        logprobs: [N] float32 nats, in any order; padding has been left out.
        offset: tokens of the row that come before.
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray
    counts: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    offset: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class ForeignRow:
    """A row of N token ids with what is said about them: L ≤ N lists of entries, the one at t about token t + 1.

    Attributes:
        token_ids: [N] int64.
        loss_mask: [L] bool.
        ids, logprobs: [L, K] int64 and float32.
        segments: [N] int64, which of several joined sequences a token belongs to, 0 for padding; None for one sequence.
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    segments: np.ndarray | None


def split_row(row: ForeignRow) -> list[ForeignSequence]:
    """The sequences that were joined in a row, each with the positions whose next token is its own.

    Raises:
        RejectedRowError: no sequence has two tokens with a position between them.
    """
    sequences = []
    for start, stop in _find_segments(row):
        positions = min(stop - 1, len(row.ids)) - start
        if positions < 1:
            continue
        ids, logprobs = row.ids[start : start + positions], row.logprobs[start : start + positions]
        is_entry = ~(logprobs <= PADDING_LOGPROB)  # NaN stays, and is found later
        counts = is_entry.sum(axis=1)
        sequences.append(
            ForeignSequence(
                token_ids=row.token_ids[start : start + positions + 1],
                loss_mask=row.loss_mask[start : start + positions] & (counts > 0),
                counts=counts,
                ids=ids[is_entry],
                logprobs=logprobs[is_entry],
                offset=start,
            )
        )
    if not sequences:
        raise RejectedRowError("too_short", f"expected two tokens or more, found {len(row.token_ids)}")
    return sequences


def _find_segments(row: ForeignRow) -> Iterator[tuple[int, int]]:
    """Half-open token ranges of the sequences of a row."""
    if row.segments is None:
        yield 0, len(row.token_ids)
        return
    borders = np.flatnonzero(np.diff(row.segments)) + 1
    edges = [0, *borders.tolist(), len(row.segments)]
    for start, stop in pairwise(edges):
        if row.segments[start]:
            yield start, stop


def read_list(table: pa.Table, name: str, row: int) -> np.ndarray:
    """One row's list of numbers.

    Raises:
        RejectedRowError: it is missing or holds a null.
    """
    values = table.column(name)[row].values
    if values is None or values.null_count:
        raise RejectedRowError("malformed", f"{name}: expected a list of numbers, found null in it")
    return values.to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]  # pyarrow is untyped


def read_rectangle(table: pa.Table, name: str, row: int, *, fill: float | None = None) -> np.ndarray:
    """One row's list of lists as [L, K]; shorter lists are filled up if there is something to fill them with.

    Raises:
        RejectedRowError: it is missing, holds a null, or its lists differ in length.
    """
    lists = table.column(name)[row].values
    if lists is None or lists.null_count:
        raise RejectedRowError("malformed", f"{name}: expected a list of lists, found null in it")
    if pa.types.is_fixed_size_list(lists.type):
        lists = lists.cast(pa.list_(lists.type.value_type))
    values, counts = lists.flatten(), np.diff(lists.offsets.to_numpy())
    if values.null_count:
        raise RejectedRowError("malformed", f"{name}: expected numbers, found null among them")
    numbers = values.to_numpy(zero_copy_only=False)
    if not len(counts) or counts.min() == counts.max():
        rectangle: np.ndarray = numbers.reshape(len(counts), -1 if len(counts) else 0)
        return rectangle
    if fill is None:
        raise RejectedRowError(
            "malformed", f"{name}: expected lists of one length, found {counts.min()} to {counts.max()} values"
        )
    filled = np.full((len(counts), counts.max()), fill, dtype=numbers.dtype)
    filled[np.arange(counts.max()) < counts[:, None]] = numbers
    return filled


def check_lengths(**lengths: int) -> None:
    """Raise RejectedRowError unless all are equal."""
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise RejectedRowError("malformed", f"expected equal lengths, found {listed}")


def check_rows_fit(tokens: int, rows: int, name: str) -> None:
    """Raise RejectedRowError unless there is a list of entries for every token, or for every token but the last."""
    if rows not in (tokens, tokens - 1):
        raise RejectedRowError(
            "malformed", f"{name}: expected {tokens} lists for {tokens} input_ids, or one less, found {rows}"
        )


def build_lists(values: np.ndarray, offsets: np.ndarray, value_type: pa.DataType) -> pa.Array:
    """A column of lists: row i holds values[offsets[i] : offsets[i + 1]]."""
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, value_type))


def build_nested_lists(rectangle: np.ndarray, offsets: np.ndarray, value_type: pa.DataType) -> pa.Array:
    """A column of lists of lists: row i holds the lists rectangle[offsets[i] : offsets[i + 1]]."""
    rows, width = rectangle.shape
    inner = build_lists(rectangle.reshape(-1), np.arange(rows + 1) * width, value_type)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), inner)
