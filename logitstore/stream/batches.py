"""Batches made of batches: records of several, some of one in any order, or the first slots of every support.

All are made of whole columns at a time, whatever the number of records and positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, TypeVar

import numpy as np

from logitstore.errors import ConfigError, ShapeError
from logitstore.records import RecordBatch
from logitstore.shard.compact import rescale
from logitstore.shard.packed import PackedRowGroup
from logitstore.store.aligned_records import AlignedBatch
from logitstore.stream.batch_memory import BatchMemory
from logitstore.stream.ranges import join_ranges

BatchT = TypeVar("BatchT", bound=RecordBatch)
_OF_RECORDS = ("units", "indices", "stream_sources")
_OF_POSITIONS = (
    "loss_mask",
    "support_counts",
    "tail_logprob",
    "entropy",
    "next_token_logprob",
    "tempered_logsumexp",
)
_OF_ENTRIES = ("support_ids", "support_logprobs", "support_draws")


def join_records(parts: Sequence[tuple[RecordBatch | PackedRowGroup, int]], memory: BatchMemory) -> RecordBatch:
    """A batch of records of several batches, in order; the columns are copied, and packed supports decoded.

    Args:
        parts: batches with the same columns and places in them, [B] of both, at least one.
        memory: where the supports go.
    """
    batches = [part.columns if isinstance(part, PackedRowGroup) else part for part, _ in parts]
    places = [place for _, place in parts]
    positions, entries = (
        [slice(*offsets[place : place + 2].tolist()) for offsets, place in zip(of_batches, places, strict=True)]
        for of_batches in ([b.position_offsets for b in batches], [b.support_offsets for b in batches])
    )
    # A record has one token more than positions, so its tokens are shifted by one for every record before it.
    tokens = [slice(part.start + place, part.stop + place + 1) for part, place in zip(positions, places, strict=True)]
    chosen = {
        _OF_RECORDS: [slice(place, place + 1) for place in places],
        _OF_POSITIONS: positions,
        ("token_ids",): tokens,
        ("support_draws",): entries,
    }
    first = batches[0]
    columns: dict[str, Any] = {
        name: None
        if getattr(first, name) is None
        else _join_column([getattr(batch, name)[part] for batch, part in zip(batches, of_name, strict=True)])
        for names, of_name in chosen.items()
        for name in names
    }
    support_offsets = _sum_up([part.stop - part.start for part in entries])
    ids, logprobs = (memory.take(int(support_offsets[-1]), dtype) for dtype in (np.int32, np.float32))
    _join_supports([part for part, _ in parts], positions, entries, columns["tail_logprob"], ids, logprobs)
    columns.update(
        position_offsets=_sum_up([part.stop - part.start for part in positions]),
        support_offsets=support_offsets,
        support_ids=ids,
        support_logprobs=logprobs,
        temperatures=first.temperatures,
        documents=tuple(b.documents[place] if b.documents else () for b, place in zip(batches, places, strict=True)),
    )
    if not isinstance(first, AlignedBatch):
        return RecordBatch(**columns)
    further = zip(*(batch.further for batch in batches if isinstance(batch, AlignedBatch)), strict=True)
    return AlignedBatch(
        **columns, further=tuple(join_records(list(zip(of_store, places, strict=True)), memory) for of_store in further)
    )


def _join_column(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The parts joined, a copy.

    NumPy lets go of the interpreter's lock for each part; among threads that all want it, getting it back takes longer
    than the copy.
    """
    joined = bytearray().join([part.data for part in parts])
    column: np.ndarray = np.frombuffer(joined, dtype=parts[0].dtype) if joined else np.concatenate(parts)
    return column.reshape(-1, *parts[0].shape[1:])


def _join_supports(
    parts: Sequence[RecordBatch | PackedRowGroup],
    positions: Sequence[slice],
    entries: Sequence[slice],
    tail_logprob: np.ndarray,
    ids: np.ndarray,
    logprobs: np.ndarray,
) -> None:
    """Fill [N] int32 `ids` and [N] float32 `logprobs` with those of parts of batches; `tail_logprob` is [P], joined."""
    mass, position, entry = np.empty(len(tail_logprob)), 0, 0
    for num_entries, run in groupby(zip(parts, positions, entries, strict=True), key=_count_rescaled_entries):
        first_position, first_entry = position, entry
        for part, of_positions, of_entries in run:
            stop = position + of_positions.stop - of_positions.start
            target = slice(entry, entry + of_entries.stop - of_entries.start)
            if isinstance(part, PackedRowGroup):
                part.supports.unpack(of_entries, ids[target], logprobs[target], mass[position:stop])
            else:
                ids[target], logprobs[target] = part.support_ids[of_entries], part.support_logprobs[of_entries]
            position, entry = stop, target.stop
        if num_entries:
            of_run = slice(first_position, position)
            rescale(mass[of_run], tail_logprob[of_run], logprobs[first_entry:entry].reshape(-1, num_entries))


def _count_rescaled_entries(found: tuple[RecordBatch | PackedRowGroup, slice, slice]) -> int:
    """Entries of each of a part's positions where its supports are still to be rescaled, else 0."""
    return found[0].supports.num_entries if isinstance(found[0], PackedRowGroup) else 0


def take_records(batch: BatchT, places: np.ndarray) -> BatchT:
    """Some records of a batch as a batch of their own; the columns are copied.

    Args:
        batch: of B records, of one store or of several.
        places: [·] int64 in [0, B), in the order wanted.
    """
    places = np.asarray(places, dtype=np.int64)
    starts, lengths = batch.position_offsets[places], np.diff(batch.position_offsets)[places]
    entries = np.diff(batch.support_offsets)[places]
    # A record has one token more than positions, so its tokens are shifted by one for every record before it.
    chosen = {
        _OF_RECORDS: places,
        _OF_POSITIONS: join_ranges(starts, lengths),
        _OF_ENTRIES: join_ranges(batch.support_offsets[places], entries),
        ("token_ids",): join_ranges(starts + places, lengths + 1),
    }
    columns: dict[str, Any] = {
        name: None if (column := getattr(batch, name)) is None else column[index]
        for names, index in chosen.items()
        for name in names
    }
    if batch.documents is not None:
        columns["documents"] = tuple(batch.documents[place] for place in places.tolist())
    if isinstance(batch, AlignedBatch):
        columns["further"] = tuple(take_records(other, places) for other in batch.further)
    return replace(batch, position_offsets=_sum_up(lengths), support_offsets=_sum_up(entries), **columns)


def first_slots(batch: BatchT, k: int) -> BatchT:
    """A batch as a capture of fewer slots would have kept it: the k likeliest entries of every position.

    What is dropped goes into the tail: log(exp(tail) + mass of the dropped entries), summed in float64. Everything
    else, the normalizers at other temperatures among it, speaks of the whole distribution and stays; columns that do
    not change are shared. Of a batch of several stores all supports are cut.

    Args:
        batch: of kept supports.
        k: slots to keep, at least 1; where a position has no more, it stays as it is.

    Raises:
        ShapeError: k is below 1.
        ConfigError: the supports are drawn.
    """
    if k < 1:
        raise ShapeError(f"first slots: expected at least 1 slot, found {k}")
    if batch.support_draws is not None:
        raise ConfigError(
            "first slots: expected supports that keep the likeliest ids, found drawn ones: their weights estimate the "
            "teacher's distribution together, and a part of them does not; capture with fewer draws instead"
        )
    further: dict[str, Any] = {}
    if isinstance(batch, AlignedBatch):
        further["further"] = tuple(first_slots(other, k) for other in batch.further)
    counts = batch.support_counts
    slot = join_ranges(np.zeros_like(counts), counts)
    is_kept = slot < k
    if is_kept.all():
        return replace(batch, **further) if further else batch
    position = np.repeat(np.arange(batch.num_positions), counts)[~is_kept]
    masses = np.exp(batch.support_logprobs[~is_kept].astype(np.float64))
    dropped = np.bincount(position, weights=masses, minlength=batch.num_positions)
    tail = batch.tail_logprob.astype(np.float64)
    with np.errstate(divide="ignore"):  # no mass at all has the log -inf
        widened = np.log(np.exp(tail) + dropped)
    kept_counts = np.minimum(counts, k)
    return replace(
        batch,
        support_counts=kept_counts,
        support_offsets=_sum_up(kept_counts)[batch.position_offsets],
        support_ids=batch.support_ids[is_kept],
        support_logprobs=batch.support_logprobs[is_kept],
        tail_logprob=np.where(dropped > 0, widened, tail).astype(batch.tail_logprob.dtype),
        **further,
    )


def _sum_up(lengths: np.ndarray | Sequence[int]) -> np.ndarray:
    """[· + 1] int64, where each of the joined parts starts, and the end."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
