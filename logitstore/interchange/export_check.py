"""Holds an exported data set to its store: files are read back and decoded, distributions compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from logitstore.corpus.files import CorpusFile, CorpusSettings, list_corpus_files
from logitstore.errors import InvalidSignalError
from logitstore.interchange.comparison import Agreement, Distributions, compare, join
from logitstore.interchange.exporting import DATA, Export
from logitstore.interchange.parquet_files import iterate_tables, open_parquet
from logitstore.interchange.rows import ForeignSequence, split_row
from logitstore.records import Record

# Units of which the first row group is compared where not everything is.
SAMPLED_UNITS = 8


def check_export(export: Export, *, is_whole: bool, report: Callable[[int, int], None]) -> Agreement:
    """Compare what the files say with what the store says.

    Args:
        export: that has been written.
        is_whole: whether every row is compared, or the first row group of some units, spread over the store.
        report: called with (units done, units to compare).
    Raises:
        InvalidSignalError: token ids, masks or supports differ.
        CorruptShardError, OutsideError: store or files cannot be read.
    """
    if not export.units:
        return Agreement()
    settings = CorpusSettings(files=[f"{export.folder.url}/{DATA}/*.parquet"], format="parquet")
    listed = list_corpus_files(settings, export.folder.storage_options)
    files = {file.path.rpartition("/")[2]: file for file in listed}
    units = export.units
    if not is_whole:
        spread = np.linspace(0, len(units) - 1, min(SAMPLED_UNITS, len(units))).round().astype(int)
        units = [export.units[i] for i in np.unique(spread)]
    agreements: list[Agreement] = []
    for done, unit in enumerate(units, start=1):
        file = files[export.get_path(unit).rpartition("/")[2]]
        agreements.extend(_check_unit(export, unit, file, is_whole=is_whole))
        report(done, len(units))
    return join(agreements)


def _check_unit(export: Export, unit: int, file: CorpusFile, *, is_whole: bool) -> Iterator[Agreement]:
    row_groups = export.list_row_groups(unit)
    with open_parquet(file, export.folder.storage_options) as parquet:
        if parquet.num_row_groups != len(row_groups):
            raise InvalidSignalError(
                f"{file.path}: expected {len(row_groups)} row groups, found {parquet.num_row_groups}; delete the file "
                "and run the export again"
            )
        for index, row_group in enumerate(row_groups[: None if is_whole else 1]):
            records = iter(export.store.read_row_group(row_group))
            for first, table in iterate_tables(parquet, export.layout, range(index, index + 1)):
                for row in range(table.num_rows):
                    record = next(records)
                    if record.num_positions == 1 and export.settings.trim:
                        continue  # a single token is left of it, and no position
                    [sequence] = split_row(export.layout.read_row(table, row))
                    yield _compare_record(export, record, sequence, f"{file.path}#{first + row}")


def _compare_record(export: Export, record: Record, sequence: ForeignSequence, where: str) -> Agreement:
    positions = len(sequence.loss_mask)
    differs = not np.array_equal(record.token_ids[: positions + 1], sequence.token_ids)
    if differs or positions < record.num_positions - export.settings.trim:
        raise InvalidSignalError(f"{where}: expected the token ids of record {record.address}, found others")
    if not np.array_equal(record.loss_mask[:positions] & (sequence.counts > 0), sequence.loss_mask):
        raise InvalidSignalError(f"{where}: expected the loss mask of record {record.address}, found another")
    top_k = export.layout.top_k
    counts = record.signal.support_counts[:positions].astype(np.int64)
    entries = int(counts.sum())
    starts = np.cumsum(counts) - counts
    is_kept = np.arange(entries) - np.repeat(starts, counts) < top_k
    expected = Distributions(
        counts=np.minimum(counts, top_k),
        ids=record.signal.support_ids[:entries][is_kept],
        logprobs=record.signal.support_logprobs[:entries][is_kept].astype(np.float64),
    )
    if export.layout.is_renormalized:
        expected = _renormalize(expected)
    found = Distributions(counts=sequence.counts, ids=sequence.ids, logprobs=sequence.logprobs)
    bound = export.layout.relative_bound
    allowed = None if bound is None else np.maximum(bound * np.abs(expected.logprobs), 2.0**-25 if bound else 0.0)
    return compare(expected, found, allowed, where=where)


def _renormalize(distributions: Distributions) -> Distributions:
    position = np.repeat(np.arange(len(distributions.counts)), distributions.counts)
    mass = np.bincount(position, weights=np.exp(distributions.logprobs), minlength=len(distributions.counts))
    with np.errstate(divide="ignore"):
        logprobs = distributions.logprobs - np.log(mass)[position]
    return Distributions(counts=distributions.counts, ids=distributions.ids, logprobs=logprobs)
