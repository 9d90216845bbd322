"""Holds an imported store to its data set: rows are read again, and compared with what the store says."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from logitstore.errors import InvalidSignalError
from logitstore.interchange.comparison import Agreement, Distributions, compare, join
from logitstore.interchange.importing import DataSetImport, RowCounts
from logitstore.records import Record, RecordBatch
from logitstore.store.logit_store import LogitStore

# Units of which the first row group is compared where not everything is.
SAMPLED_UNITS = 8


def check_import(
    store: LogitStore, data_set: DataSetImport, *, is_whole: bool, report: Callable[[int, int], None]
) -> Agreement:
    """Compare what the store says with what the data set says, after its own checks and before any codec.

    Args:
        store: opened at the manifest that the import wrote.
        data_set: it was made from.
        is_whole: whether every record is compared, or the first row group of some units, spread over the store.
        report: called with (units done, units to compare).
    Raises:
        InvalidSignalError: token ids, masks or supports differ.
        CorpusError, CorruptShardError, OutsideError: store or data set cannot be read.
    """
    units = np.unique(store.row_group_units)
    if not is_whole and len(units):
        units = units[np.unique(np.linspace(0, len(units) - 1, min(SAMPLED_UNITS, len(units))).round().astype(int))]
    agreements: list[Agreement] = []
    for done, unit in enumerate(units.tolist(), start=1):
        agreements.extend(_check_unit(store, data_set, unit, is_whole=is_whole))
        report(done, len(units))
    return join(agreements)


def _check_unit(store: LogitStore, data_set: DataSetImport, unit: int, *, is_whole: bool) -> Iterator[Agreement]:
    expected = data_set.read_records(unit, RowCounts())
    first, last = np.searchsorted(store.row_group_units, [unit, unit + 1]).tolist()
    for row_group in range(first, last if is_whole else first + 1):
        for stored in store.read_row_group(row_group, with_documents=True):
            yield _compare_records(store, next(expected, None), stored)
    if is_whole and next(expected, None) is not None:
        raise InvalidSignalError(f"{store.url}: unit {unit}: expected more records, as the data set has")


def _compare_records(store: LogitStore, expected: Record | None, stored: Record) -> Agreement:
    where = f"{store.url}: record {stored.address}"
    if (
        expected is None
        or expected.documents != stored.documents
        or not np.array_equal(expected.token_ids, stored.token_ids)
        or not np.array_equal(expected.loss_mask, stored.loss_mask)
    ):
        raise InvalidSignalError(f"{where}: expected tokens and loss mask of the data set's row, found others")
    allowed = store.plan.shard.codec.bound_support(RecordBatch.from_records([expected]))
    return compare(_read(expected), _read(stored), allowed, where=where)


def _read(record: Record) -> Distributions:
    signal = record.signal
    return Distributions(
        counts=signal.support_counts,
        ids=signal.support_ids,
        logprobs=signal.support_logprobs,
        tail_logprob=signal.tail_logprob,
    )
