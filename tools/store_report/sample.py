"""The records that a page shows: a few from each of row groups that are spread over the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from logitstore.comparison import compare_signals
from logitstore.errors import CorruptShardError
from logitstore.records import Record, RecordBatch
from logitstore.store.aligned_records import AlignedBatch
from logitstore.store.aligned_stores import AlignedStores
from logitstore.store.logit_store import LogitStore
from tools.store_diff import choose_row_groups
from tools.store_report.voices import Voice, build_voice, join_voices

# A row group is read whole, 4 to 16 MB: few of them, so that a page of a remote store takes seconds.
MAX_ROW_GROUPS = 12
PROBABILITY_BINS = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Records with what the voices say about them.

    Attributes:
        records: in the order of addresses; of the first store, with its documents.
        voices: of the stores, at the positions of all records.
        positions_read: of all row groups that were read.
        support_sizes: positions read by the number of entries in their support, of each store.
        next_probabilities: likewise by the probability of the token that came next, in 20 bins; none where no store
            position tells it.
        damaged: what could not be read.
    """

    records: tuple[Record, ...]
    voices: tuple[Voice, ...]
    positions_read: int
    support_sizes: tuple[np.ndarray, ...]
    next_probabilities: tuple[np.ndarray, ...]
    damaged: tuple[str, ...]

    @property
    def num_positions(self) -> int:
        return sum(record.num_positions for record in self.records)


def read_sample(
    source: LogitStore | AlignedStores,
    names: tuple[str, ...],
    *,
    max_records: int,
    top: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Sample:
    """Read records of a store, or of two that are aligned.

    Args:
        source: one store, or several.
        names: of the voices, one for each store.
        max_records: how many; fewer where the store has fewer.
        top: candidates at each position.
        report: called with row groups done and to do.
    Raises:
        CorruptShardError: nothing of the store can be read; where some can, `damaged` says what cannot.
    """
    records: list[Record] = []
    parts: list[tuple[Voice, ...]] = []
    counts = [_Counts() for _ in names]
    damaged: list[CorruptShardError] = []
    chosen = _choose(source, max_records)
    shares = share_out(source.row_group_records[chosen], max_records)
    for done, (row_group, share) in enumerate(zip(chosen, shares.tolist(), strict=True), start=1):
        try:
            batch = source.read_row_group(row_group, with_documents=True)
        except CorruptShardError as error:
            damaged.append(error)
            continue
        places = np.arange(share) * len(batch) // max(1, share)
        for one, part in zip(counts, _list_batches(batch), strict=True):
            one.add(part)
        taken = [_take(part, places) for part in _list_batches(batch)]
        kls = [None, *(compare_signals(taken[0], other).kl for other in taken[1:])]
        parts.append(tuple(build_voice(name, part, top, kl) for name, part, kl in zip(names, taken, kls, strict=True)))
        records += list(taken[0])
        report(done, len(chosen))
    if damaged and not records:
        raise damaged[0]
    return Sample(
        records=tuple(records),
        voices=tuple(join_voices(voices) for voices in zip(*parts, strict=True)),
        positions_read=counts[0].positions,
        support_sizes=tuple(one.support_sizes for one in counts),
        next_probabilities=tuple(one.next_probabilities for one in counts),
        damaged=tuple(str(error) for error in damaged),
    )


def _choose(source: LogitStore | AlignedStores, max_records: int) -> list[int]:
    """Row groups that hold so many records, but no more than MAX_ROW_GROUPS of them, evenly spread."""
    records = source.row_group_records
    if not len(records):
        return []
    num_row_groups = min(len(records), MAX_ROW_GROUPS, max_records)
    spread = choose_row_groups(records, max(1, int(records.mean() * num_row_groups)))
    return [int(row_group) for row_group in spread[:num_row_groups]]


def share_out(sizes: np.ndarray, total: int) -> np.ndarray:
    """[G] int64, as even shares of a total as the sizes allow; all of them where they are not more."""
    shares = np.zeros(len(sizes), dtype=np.int64)
    left = total
    for rank, place in enumerate(np.argsort(sizes, kind="stable")):
        shares[place] = min(int(sizes[place]), left // (len(sizes) - rank))
        left -= int(shares[place])
    return shares


def _list_batches(batch: RecordBatch) -> Iterator[RecordBatch]:
    yield batch
    if isinstance(batch, AlignedBatch):
        yield from batch.further


def _take(batch: RecordBatch, places: np.ndarray) -> RecordBatch:
    return RecordBatch.from_records([batch.record(int(place)) for place in places])


class _Counts:
    """Histograms of the positions of one store."""

    def __init__(self) -> None:
        self.positions = 0
        self.support_sizes = np.zeros(1, dtype=np.int64)
        self.next_probabilities = np.zeros(PROBABILITY_BINS, dtype=np.int64)

    def add(self, batch: RecordBatch) -> None:
        self.positions += batch.num_positions
        sizes = np.bincount(batch.support_counts, minlength=len(self.support_sizes))
        self.support_sizes = np.pad(self.support_sizes, (0, len(sizes) - len(self.support_sizes))) + sizes
        known = np.exp(batch.next_token_logprob[~np.isnan(batch.next_token_logprob)].astype(np.float64))
        bins = np.clip((known * PROBABILITY_BINS).astype(np.int64), 0, PROBABILITY_BINS - 1)
        self.next_probabilities += np.bincount(bins, minlength=PROBABILITY_BINS)
