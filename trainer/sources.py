"""The records of a run: those that it trains on, as a stream, and those that it is evaluated on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from logitstore.errors import ConfigError
from logitstore.records import RecordBatch
from logitstore.store.aligned_stores import AlignedStores
from logitstore.store.logit_store import LogitStore
from logitstore.stream.iterator import RecordStream
from logitstore.stream.selection import HeldOut, leave_out_records, select_records, split_row_groups
from logitstore.stream.source import StreamSource
from logitstore.stream.source_reader import SourceReader
from logitstore.stream.subset import RecordSubset
from trainer.config import TrainSettings
from trainer.distributed import Processes
from trainer.stores import RunStores


def select_sources(
    settings: TrainSettings, stores: RunStores, *, is_mixture: bool = False
) -> tuple[list[StreamSource], RecordSubset]:
    """What a run trains on, the first corpus first, and the records of its own store that it is evaluated on.

    What is held out of the first corpus is held out of further corpora of the same sequences, too.

    Args:
        settings: of the run.
        stores: that it opened.
        is_mixture: whether the order is one of several corpora, of which one alone may be left.

    Raises:
        IncompatibleStoreError: the teachers' stores are not of the same sequences, or have no records in common.
        ConfigError: nothing is left to train on, or to evaluate on where something is held out.
    """
    first, held_out = select_records(stores.teachers[0], settings.where, settings.held_out)
    store, subset = join_teachers(stores.teachers, first)
    own_weight, *weights = settings.corpus_weights
    own = StreamSource(store, subset=subset, weight=own_weight)
    sources = [replace(own, name=own.fingerprint) if is_mixture else own]
    for asked, corpus, weight in zip(settings.further_corpora, stores.corpora, weights, strict=True):
        _check_manifest(stores.teachers[0], corpus)
        chosen, _ = select_records(corpus, asked.where)
        if settings.held_out is not None:
            chosen = _leave_out_held(chosen, corpus, stores.teachers[0], settings.held_out)
        sources.append(StreamSource(corpus, subset=chosen, weight=weight))
    _check_distinct(sources)
    return sources, held_out


def _leave_out_held(records: RecordSubset, corpus: LogitStore, first: LogitStore, held_out: HeldOut) -> RecordSubset:
    """Records of a corpus that may be of the first one's sequences, by the same teacher or another."""
    left = leave_out_records(records, corpus, first, split_row_groups(first, held_out)[1])
    if not len(left):
        raise ConfigError(
            f"further_corpora: {corpus.url}: expected records to train on, found that all {len(records)} records that "
            f"it is asked for are held out of the first store, {first.url}; choose others with its where"
        )
    return left


def _check_manifest(first: LogitStore, corpus: LogitStore) -> None:
    """A corpus that is the first store has to be at the same manifest: that decides what is held out."""
    if corpus.manifest.plan_fingerprint == first.manifest.plan_fingerprint and corpus.fingerprint != first.fingerprint:
        raise ConfigError(
            f"further_corpora: {corpus.url}: expected the manifest of the first store, which it is a copy of\n"
            f"  first store: {first.manifest_number}, in {first.url}\n  this one:    {corpus.manifest_number}\n"
            "give both the same manifest, or records that are held out of one would come out of the other"
        )


def _check_distinct(sources: Sequence[StreamSource]) -> None:
    url_of: dict[str, str] = {}
    for source in sources:
        if source.fingerprint in url_of:
            raise ConfigError(
                f"further_corpora: {source.url}: expected records that are not those of another corpus of the run, "
                f"found the very ones of {url_of[source.fingerprint]}; leave one out and give the other both weights, "
                "or choose other records with its where"
            )
        url_of[source.fingerprint] = source.url


def join_teachers(
    stores: Sequence[LogitStore], records: RecordSubset
) -> tuple[LogitStore | AlignedStores, RecordSubset]:
    """What to stream from so that every teacher speaks about each record, and which records of it.

    Args:
        stores: of all teachers.
        records: of the first store.

    Raises:
        IncompatibleStoreError: the stores are not of the same sequences, or have no records in common.
        ConfigError: the records that they have in common are not among those asked for.
    """
    if len(stores) == 1:
        return stores[0], records
    aligned = AlignedStores(stores)
    common = records.restrict(aligned.first_row_groups)
    if not len(common):
        raise ConfigError(
            f"held_out: expected records to train on, found that all {len(aligned)} records that every teacher's store "
            "has are held out or left out; choose others, or capture more of the corpus with every teacher"
        )
    return aligned, replace(common, row_groups=np.searchsorted(aligned.first_row_groups, common.row_groups))


def open_stream(
    settings: TrainSettings, sources: Sequence[StreamSource], processes: Processes, *, with_documents: bool
) -> RecordStream:
    """This rank's stream of the records of all sources."""
    return RecordStream(
        sources,
        global_batch_sequences=settings.global_batch_sequences,
        seed=settings.seed if settings.order_seed is None else settings.order_seed,
        rank=processes.rank,
        world_size=processes.world_size,
        skip=settings.skip_steps,
        read_ahead_steps=settings.stream.read_ahead_steps,
        threads=settings.stream.threads,
        with_documents=with_documents,
        scratch=settings.scratch,
    )


def read_records(
    store: LogitStore, records: RecordSubset, processes: Processes, *, with_documents: bool = False
) -> Iterator[RecordBatch]:
    """This rank's share of some records of a store, a row group at a time."""
    reader = SourceReader([StreamSource(store, subset=records)], with_documents=with_documents)
    for index in range(processes.rank, len(records.row_groups), processes.world_size):
        yield reader.read(index)


def name_records(batch: RecordBatch) -> list[str]:
    """The address of every record, for messages; of several corpora, with the number of its own, the first one's 0."""
    addresses = [str(address) for address in batch.addresses()]
    if batch.stream_sources is None:
        return addresses
    return [f"{address} of corpus {n}" for address, n in zip(addresses, batch.stream_sources.tolist(), strict=True)]
