"""SourceReader: the row groups of all sources of a stream, numbered through, and batches of their records."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from logitstore.errors import IncompatibleStoreError
from logitstore.records import Record, RecordAddress, RecordBatch, Signal
from logitstore.shard.packed import PackedRowGroup
from logitstore.store.aligned_records import AlignedBatch, AlignedRecord
from logitstore.store.aligned_stores import AlignedStores
from logitstore.store.logit_store import LogitStore
from logitstore.stream.batch_memory import BatchMemory
from logitstore.stream.batches import join_records, take_records
from logitstore.stream.scratch import RowGroupScratch, ScratchSettings
from logitstore.stream.source import StreamSource

_ENTRY_BYTES = 3  # compressed, of an id and a logprob, which are nearly all of a row group
StoreT = TypeVar("StoreT", bound=LogitStore | AlignedStores)


class SourceReader:
    """Reads row groups of several sources: those of source 0 first, then of source 1, …; safe to use from threads.

    Args:
        sources: of which the records go together.
        with_documents: whether the records name their documents.
        scratch: where to keep decompressed row groups, if anywhere.
    Raises:
        IncompatibleStoreError: records of the sources cannot be joined to one batch.
        ConfigError: see `RowGroupScratch`.
    """

    def __init__(
        self, sources: Sequence[StreamSource], *, with_documents: bool, scratch: ScratchSettings | None = None
    ) -> None:
        check_sources_join(sources)
        self._scratch_settings = scratch
        self.scratch = None if scratch is None else RowGroupScratch(scratch)
        self.sources = tuple(sources)
        self._with_documents = with_documents
        self._stores = tuple(store for source in sources for store in source.stores)
        self._starts = np.cumsum([0, *(len(source.records.row_groups) for source in sources)])
        self._memory = BatchMemory()
        self._batch_type = AlignedBatch if isinstance(sources[0].store, AlignedStores) else RecordBatch

    def estimate_entries(self) -> int:
        """About how many support entries all records have, from the bytes of their stores."""
        num_bytes = sum(
            int(store.row_group_bytes.sum()) * int(source.records.counts.sum()) / max(1, len(source.store))
            for source in self.sources
            for store in source.stores
        )
        return int(num_bytes / _ENTRY_BYTES)

    def read(self, row_group: int) -> RecordBatch:
        """The records that a source has in one of its row groups, in a batch that holds no others.

        Raises:
            CorruptShardError, OutsideError: as in `LogitStore.read_row_group`.
        """
        number, index = self._locate(row_group)
        records = self.sources[number].records
        place, count = int(records.row_groups[index]), int(records.counts[index])
        batch: RecordBatch = self.sources[number].store.read_row_group(place, with_documents=self._with_documents)
        if count != len(batch):
            _, places = records.locate(np.full(count, index), np.arange(count))
            batch = take_records(batch, places)
        return self._name_source(batch, number)

    def read_packed(self, row_group: int) -> RecordBatch | PackedRowGroup:
        """The same, from the scratch if it is there; supports are left for `join` to decode where that saves time."""
        if self.scratch is None:
            return self._read_packed(row_group)
        found: RecordBatch | PackedRowGroup | None = self.scratch.find(row_group)
        if found is None:
            found = self._read_packed(row_group)
            self.scratch.keep(row_group, found)
        return found

    def _read_packed(self, row_group: int) -> RecordBatch | PackedRowGroup:
        number, index = self._locate(row_group)
        store, records = self.sources[number].store, self.sources[number].records
        place = int(records.row_groups[index])
        if not isinstance(store, LogitStore) or records.counts[index] != store.row_group_records[place]:
            return self.read(row_group)
        found = store.read_packed_row_group(place, with_documents=self._with_documents)
        if isinstance(found, RecordBatch):
            return self._name_source(found, number)
        columns = self._name_source(found.columns, number)
        return found if columns is found.columns else replace(found, columns=columns)

    def _locate(self, row_group: int) -> tuple[int, int]:
        """The source of a row group, and which of its row groups it is."""
        number = int(np.searchsorted(self._starts, row_group, side="right")) - 1
        return number, row_group - int(self._starts[number])

    def _name_source(self, batch: RecordBatch, number: int) -> RecordBatch:
        return batch if len(self.sources) == 1 else replace(batch, stream_sources=np.full(len(batch), number))

    def join(self, parts: Sequence[tuple[RecordBatch | PackedRowGroup, int]]) -> RecordBatch:
        """A batch of records, given as what `read_packed` returned and places in it; there may be none."""
        if parts:
            return join_records(parts, self._memory)
        # The rank's part of a short batch; its columns are those of any other.
        record = build_empty_record(self.sources[0])
        return take_records(self._batch_type.from_records([record]), np.zeros(0, dtype=np.int64))

    @property
    def is_of_another_process(self) -> bool:
        """Whether a store was opened before a fork of which this process is the child."""
        pid = os.getpid()
        return any(store.process_id != pid for store in self._stores)

    def reopen(self) -> SourceReader:
        """The same over stores that were opened anew: clients of storages do not outlive a fork."""
        sources = [replace(source, store=_reopen(source.store)) for source in self.sources]
        return SourceReader(sources, with_documents=self._with_documents, scratch=self._scratch_settings)


def _reopen(store: StoreT) -> StoreT:
    opened: StoreT = pickle.loads(pickle.dumps(store))
    return opened


def build_empty_record(source: StreamSource) -> Record:
    """A record of no positions with the columns that all records of a source have; nothing is read for it."""
    first, *further = (_build_empty_record_of_store(store) for store in source.stores)
    return AlignedRecord(**vars(first), further=tuple(further)) if further else first


def _build_empty_record_of_store(store: LogitStore) -> Record:
    ids, logs = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32)
    temperatures = store.plan.temperatures
    return Record(
        address=RecordAddress(unit=0, index=0),
        token_ids=np.zeros(1, dtype=np.int32),
        loss_mask=np.zeros(0, dtype=bool),
        signal=Signal(
            support_counts=ids,
            support_ids=ids,
            support_logprobs=logs,
            tail_logprob=logs,
            entropy=logs,
            next_token_logprob=logs,
            support_draws=np.zeros(0, dtype=np.uint16) if store.plan.is_drawn else None,
            temperatures=temperatures,
            tempered_logsumexp=np.zeros((0, len(temperatures)), dtype=np.float32) if temperatures else None,
        ),
    )


def check_sources_join(sources: Sequence[StreamSource]) -> None:
    """Check that the records of several sources can be in one batch, and mean the same there.

    Raises:
        IncompatibleStoreError: they cannot; prints both sides of everything that differs.
    """
    first = sources[0]
    for other in sources[1:]:
        one, two = _describe_records(first), _describe_records(other)
        differing = [name for name in one if one[name] != two[name]]
        if differing:
            listed = "\n".join(
                f"  {name}\n    {first.label}: {one[name]}\n    {other.label}: {two[name]}" for name in differing
            )
            raise IncompatibleStoreError(
                f"stream: source {other.label}: expected records that go into one batch with those of {first.label}, "
                f"found others:\n{listed}\ncapture with the same tokenizer and kind of signal, or train on one of them"
            )


def _describe_records(source: StreamSource) -> dict[str, object]:
    plans = [store.plan for store in source.stores]
    return {
        "tokenizer_fingerprint": plans[0].teacher.tokenizer_fingerprint,
        "vocab_size": plans[0].teacher.vocab_size,
        "teachers of each record": len(plans),
        "drawn supports": [plan.is_drawn for plan in plans],
        "temperatures": [plan.temperatures for plan in plans],
        "unknown_scalars": [sorted(plan.unknown_scalars) for plan in plans],
    }
