"""A store from a data set: unit by unit, resumable like a capture, rows that cannot be used being dead letters."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from logitstore import __version__
from logitstore.corpus.documents import DeadLetter, Place
from logitstore.corpus.files import CorpusFile, StorageOptions
from logitstore.errors import ConfigError, OutsideError
from logitstore.interchange.import_plan import ImportPlan
from logitstore.interchange.parquet_files import check_columns, iterate_tables, open_parquet
from logitstore.interchange.rows import ForeignSequence, RejectedRowError, split_row
from logitstore.interchange.signals import build_signal
from logitstore.records import DocumentSpan, Record, RecordAddress, Signal
from logitstore.shard.layout import FORMAT_VERSION, ShardHeader
from logitstore.shard.summary import ShardSummary
from logitstore.shard.writer import write_shard
from logitstore.store.commit import (
    Commit,
    Outcome,
    build_attempt,
    build_commit_path,
    build_data_path,
    commit_unit,
    count_dead_letters,
)
from logitstore.store.files import StoreFiles
from logitstore.store.plan import StorePlan


@dataclass
class RowCounts:
    """Rows of a unit so far: those that came in, and those that could not be used."""

    rows: int = 0
    dead_letters: list[DeadLetter] = field(default_factory=list)


class DataSetImport:
    """Imports the units of a plan.

    Args:
        files: the store.
        plan: how the data set is read; its store plan is the store's, as stored.
        storage_options: for reading the data set.
    """

    def __init__(self, files: StoreFiles, plan: ImportPlan, storage_options: StorageOptions | None = None) -> None:
        self._files, self.plan, self._storage_options = files, plan, storage_options
        self._units = plan.store.build_unit_table()
        self._fingerprint = plan.store.compute_fingerprint()

    def import_unit(self, unit: int) -> bool:
        """Write and commit a unit; returns whether it was done now, and not before or by somebody else.

        Raises:
            CorpusError, OutsideError: the data set cannot be read, or the store not written to.
            InvalidSignalError: a shard breaks an invariant or its codec's bound.
        """
        if self._files.exists(build_commit_path(unit)):
            return False
        started = time.monotonic()
        attempt = build_attempt()
        counts = RowCounts()
        shard, path = self._write(unit, attempt, self.read_records(unit, counts))
        letter_counts, letters = count_dead_letters(counts.dead_letters)
        commit = Commit(
            plan_fingerprint=self._fingerprint,
            unit=unit,
            source=self._units.source_of(unit, self.plan.store.files),
            attempt=attempt,
            file=path,
            shard=shard,
            documents=counts.rows,
            recorded_documents=counts.rows - len(counts.dead_letters),
            dead_letter_counts=letter_counts,
            dead_letters=letters,
            engine=f"imported {self.plan.store.teacher.engine_version}",
            created_by=f"logitstore {__version__}",
            seconds=round(time.monotonic() - started, 3),
        )
        outcome = commit_unit(self._files, commit)
        if outcome is Outcome.LOST and path is not None:
            with contextlib.suppress(OutsideError, ConfigError):  # garbage, and `gc` collects what stays
                self._files.delete(path)
        return outcome is Outcome.WON

    def read_records(self, unit: int, counts: RowCounts) -> Iterator[Record]:
        """Records of a unit as the data set tells them, before any codec; a row may hold several sequences.

        Args:
            unit: of the plan.
            counts: kept up to date with every record.
        """
        index = itertools.count()
        for span in self._units.spans(unit):
            file = self.plan.store.files[span.file_index]
            for row, found in self._read_rows(file, range(span.start, span.stop or 0)):
                counts.rows += 1
                name = f"{file.path}#{row}"
                if isinstance(found, RejectedRowError):
                    place = Place(name, partial("row {}".format, row))
                    counts.dead_letters.append(place.reject(found.reason, found.detail))
                    continue
                for sequence, signal in found:
                    yield Record(
                        address=RecordAddress(unit=unit, index=next(index)),
                        token_ids=sequence.token_ids.astype("int32"),
                        loss_mask=sequence.loss_mask,
                        signal=signal,
                        documents=(DocumentSpan(document_id=name, start=0, document_offset=sequence.offset),),
                    )

    def _read_rows(
        self, file: CorpusFile, row_groups: range
    ) -> Iterator[tuple[int, list[tuple[ForeignSequence, Signal]] | RejectedRowError]]:
        """(row of the file, its sequences with their signals or what is wrong with it)."""
        layout, rules = self.plan.layout, self.plan.rules
        with open_parquet(file, self._storage_options) as parquet:
            check_columns(file.path, parquet.schema_arrow, layout)
            for first, table in iterate_tables(parquet, layout, row_groups):
                for row in range(table.num_rows):
                    try:
                        sequences = split_row(layout.read_row(table, row))
                        yield first + row, [(sequence, build_signal(sequence, rules)) for sequence in sequences]
                    except RejectedRowError as rejection:
                        yield first + row, rejection

    def _write(self, unit: int, attempt: str, records: Iterator[Record]) -> tuple[ShardSummary | None, str | None]:
        """Assemble the shard beside us and upload it; (None, None) where the unit has no usable row."""
        first = next(records, None)
        if first is None:
            return None, None
        plan: StorePlan = self.plan.store
        header = ShardHeader(
            format_version=FORMAT_VERSION,
            unit=unit,
            plan_fingerprint=self._fingerprint,
            vocab_size=plan.teacher.vocab_size,
            codec=plan.shard.codec,
            unknown_scalars=plan.unknown_scalars,
        )
        with tempfile.TemporaryDirectory(prefix="logitstore-") as folder:
            spilled = Path(folder) / f"{unit:07d}.parquet"
            shard = write_shard(spilled, itertools.chain([first], records), header, plan.shard)
            path = build_data_path(unit, attempt)
            self._files.put_file(path, spilled)
        return shard, path
