"""Capture of one work unit: corpus range in, committed shard out. No Ray here; `cluster/` spreads it over machines."""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from logitstore import __version__
from logitstore.answers import strip_answer
from logitstore.corpus.documents import CorpusSettings, DeadLetter, Document, read_documents
from logitstore.corpus.sequences import Sequence
from logitstore.corpus.units import UnitTable
from logitstore.errors import (
    ConfigError,
    IncompatibleStoreError,
    InvalidLogitsOfSequenceError,
    OutsideError,
    TeacherError,
    UnusableDocumentError,
)
from logitstore.given_sequences import score_sequences
from logitstore.records import Record, RecordAddress, Signal
from logitstore.settings import Settings
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
from logitstore.teacher.draw_key import build_draw_key
from logitstore.teacher.protocol import Teacher
from logitstore.told_answers import ToldSequence
from logitstore.unit_sequences import SequenceMaker, UnitBuild

_LOG = logging.getLogger(__name__)
# Documents of a unit that may be left out because the teacher's logits are not finite; each makes the unit begin anew.
MOST_UNUSABLE_DOCUMENTS = 8
# Positions handed to the teacher at a time: enough for it to sort into even batches, little enough to hold.
_POSITIONS_AT_A_TIME = 131_072


class Receipt(Settings):
    """What a captured unit reports: small, the only thing that travels back through Ray."""

    unit: int
    outcome: Outcome
    records: int
    positions: int
    bytes: int
    documents: int
    dead_letters: int
    dead_letter_counts: dict[str, int] = Field(default_factory=dict)
    seconds: float


class UnitCapture:
    """Captures units of one plan with one loaded teacher.

    Args:
        files: the store.
        plan: its plan.
        teacher: must be the plan's teacher.
        corpus: how documents are read.
        storage_options: for reading the corpus.
        spill_folder: where a shard is assembled before it is uploaded; the system's temporary folder by default.
    Raises:
        IncompatibleStoreError: the teacher is not the one in the plan.
        ConfigError: the teacher cannot do what the plan asks for.
    """

    def __init__(
        self,
        files: StoreFiles,
        plan: StorePlan,
        teacher: Teacher,
        corpus: CorpusSettings,
        *,
        storage_options: dict[str, Any] | None = None,
        spill_folder: Path | None = None,
    ) -> None:
        differences = plan.teacher.differences(teacher.identity, writes_answers=plan.generate is not None)
        if differences:
            raise IncompatibleStoreError(
                f"{files.url}: this teacher is not the one the store was planned with:\n  " + "\n  ".join(differences)
            )
        self._files, self._plan, self._teacher, self._corpus = files, plan, teacher, corpus
        self._storage_options = storage_options
        self._spill_folder = spill_folder
        self._sequences = SequenceMaker(
            teacher,
            chat=plan.corpus.chat,
            sequences=plan.sequences,
            generate=plan.generate,
            seed=plan.seed,
            has_given_ids=plan.corpus.given_ids is not None,
        )
        self._fingerprint = plan.compute_fingerprint()
        self._units: UnitTable = plan.build_unit_table()

    def capture(self, unit: int, attempt: str | None = None) -> Receipt:
        """Run the teacher over a unit and commit its shard.

        A unit that is committed already is left as it is: its receipt says "lost", with counts of zero. A kill at any
        point leaves the unit either uncommitted (with garbage to collect at most) or committed whole.

        Raises:
            TeacherError, InvalidSignalError: what the teacher said cannot be stored; nothing is committed. Documents
                whose logits are not finite do not lead here, up to a few of a unit: they become dead letters.
            OutsideError: the storage failed; nothing is committed.
        """
        started = time.monotonic()
        if self._files.exists(build_commit_path(unit)):
            return _build_lost_receipt(unit)
        attempt = attempt or build_attempt()
        build, shard, path = self._write_usable(unit, attempt)
        counts, dead_letters = count_dead_letters(build.dead_letters)
        commit = Commit(
            plan_fingerprint=self._fingerprint,
            unit=unit,
            source=self._units.source_of(unit, self._plan.files),
            attempt=attempt,
            file=path,
            shard=shard,
            documents=build.num_documents,
            recorded_documents=build.num_recorded_documents,
            dead_letter_counts=counts,
            dead_letters=dead_letters,
            engine=f"{self._teacher.identity.engine} {self._teacher.identity.engine_version}",
            created_by=f"logitstore {__version__}",
            seconds=round(time.monotonic() - started, 3),
        )
        assert commit.find_imbalance() is None, commit.find_imbalance()
        outcome = commit_unit(self._files, commit)
        if outcome is Outcome.LOST and path is not None:
            with contextlib.suppress(OutsideError, ConfigError):  # garbage, and `gc` collects what stays
                self._files.delete(path)
        return Receipt(
            unit=unit,
            outcome=outcome,
            records=shard.records if shard else 0,
            positions=shard.positions if shard else 0,
            bytes=shard.bytes if shard else 0,
            documents=build.num_documents,
            dead_letters=sum(counts.values()),
            dead_letter_counts=counts,
            seconds=time.monotonic() - started,
        )

    def _read_unit(self, unit: int, unusable: Mapping[str, str]) -> Iterator[Document | DeadLetter]:
        """The unit's documents, those that are unusable as dead letters that say why."""
        for span in self._units.spans(unit):
            file = self._plan.files[span.file_index]
            for item in read_documents(file, span.start, span.stop, self._corpus, self._storage_options):
                if isinstance(item, Document) and item.document_id in unusable:
                    yield item.reject("invalid_signal", unusable[item.document_id])
                else:
                    yield item

    def _write_usable(self, unit: int, attempt: str) -> tuple[UnitBuild, ShardSummary | None, str | None]:
        """Write the unit's shard without the documents that the teacher has no finite logits for.

        Each of them costs the unit's scores up to there: with one document fewer, all records after it are others.
        Documents of the unit that share its id go with it. A teacher that can score none of a unit's documents, or too
        few, is not taken for one that is well.
        """
        unusable: dict[str, str] = {}
        while True:
            build = self._sequences.build(unit, self._read_unit(unit, unusable))
            try:
                shard, path = self._write(unit, attempt, build)
            except UnusableDocumentError as error:
                if error.document_id in unusable or len(unusable) == MOST_UNUSABLE_DOCUMENTS:
                    raise
                _LOG.warning("unit %d goes on without a document: %s", unit, error)
                unusable[error.document_id] = error.detail
                continue
            if unusable and shard is None:
                raise TeacherError(
                    f"teacher {self._plan.teacher.model!r}: expected finite logits for a document of unit {unit} at "
                    f"least, found none for {list(unusable)}; try another dtype or check the weights"
                )
            return build, shard, path

    def _write(self, unit: int, attempt: str, build: UnitBuild) -> tuple[ShardSummary | None, str | None]:
        """Assemble the shard beside us and upload it; (None, None) where the unit has no usable document."""
        # Closed on the way out: an engine would go on with answers that nobody waits for.
        with contextlib.closing(_iterate(build)) as sequences:
            first = next(sequences, None)
            if first is None:
                return None, None
            return self._write_records(unit, attempt, self._score(unit, itertools.chain([first], sequences)))

    def _write_records(self, unit: int, attempt: str, records: Iterator[Record]) -> tuple[ShardSummary, str]:
        header = ShardHeader(
            format_version=FORMAT_VERSION,
            unit=unit,
            plan_fingerprint=self._fingerprint,
            vocab_size=self._plan.teacher.vocab_size,
            codec=self._plan.shard.codec,
            unknown_scalars=self._plan.unknown_scalars,
            is_drawn=self._plan.is_drawn,
            temperatures=self._plan.temperatures,
            has_labels=self._plan.has_labels,
        )
        with tempfile.TemporaryDirectory(prefix="logitstore-", dir=self._spill_folder) as folder:
            spilled = Path(folder) / f"{unit:07d}.parquet"
            shard = write_shard(spilled, records, header, self._plan.shard)
            path = build_data_path(unit, attempt)
            self._files.put_file(path, spilled)
        return shard, path

    def _score(self, unit: int, sequences: Iterator[Sequence]) -> Iterator[Record]:
        index = 0
        for group in _group_sequences(sequences):
            try:
                for sequence, signal in zip(group, self._find_signals(unit, index, group), strict=True):
                    yield Record(
                        address=RecordAddress(unit=unit, index=index),
                        token_ids=sequence.token_ids,
                        loss_mask=sequence.loss_mask,
                        signal=signal,
                        documents=sequence.documents,
                    )
                    index += 1
            except InvalidLogitsOfSequenceError as error:
                document_id = self._find_unusable_document(group[error.sequence], error.position)
                prompt_id = strip_answer(document_id) if self._plan.generate else document_id
                raise UnusableDocumentError(prompt_id, error) from error

    def _find_unusable_document(self, sequence: Sequence, position: int) -> str:
        """Id of the document of a sequence that the teacher fails at on its own, or of the one at a position.

        The position alone may accuse the document before: attention kernels multiply NaN by weights of 0.
        """
        stops = [*(span.start for span in sequence.documents[1:]), len(sequence.token_ids) - 1]
        suspect = sequence.documents[0]
        for span, stop in zip(sequence.documents, stops, strict=True):
            try:
                if len(sequence.documents) > 1 and stop > span.start:
                    list(self._teacher.score([sequence.token_ids[span.start : stop + 1]], [0]))
            except InvalidLogitsOfSequenceError:
                return span.document_id
            if span.start <= position:
                suspect = span
        return suspect.document_id

    def _find_signals(self, unit: int, index: int, group: list[Sequence]) -> Iterator[Signal]:
        """What the teacher says about sequences; `index` is that of the first in its unit."""
        told = [sequence.signal for sequence in group if isinstance(sequence, ToldSequence)]
        if told:
            return iter(told)  # all of a unit or none
        keys = [build_draw_key(self._plan.seed, unit, index + i) for i in range(len(group))]
        return score_sequences(self._teacher, group, keys)


def _build_lost_receipt(unit: int) -> Receipt:
    return Receipt(
        unit=unit, outcome=Outcome.LOST, records=0, positions=0, bytes=0, documents=0, dead_letters=0, seconds=0.0
    )


def _iterate(build: UnitBuild) -> Generator[Sequence, None, None]:
    yield from build


def _group_sequences(sequences: Iterator[Sequence]) -> Iterator[list[Sequence]]:
    group: list[Sequence] = []
    positions = 0
    for sequence in sequences:
        group.append(sequence)
        positions += len(sequence.loss_mask)
        if positions >= _POSITIONS_AT_A_TIME:
            yield group
            group, positions = [], 0
    if group:
        yield group
