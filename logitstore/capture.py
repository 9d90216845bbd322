"""Capture of one work unit: corpus range in, committed shard out. No Ray here; `cluster/` spreads it over machines."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from logitstore import __version__
from logitstore.corpus.documents import CorpusSettings, DeadLetter, Document, read_documents
from logitstore.corpus.sequences import Sequence
from logitstore.corpus.units import UnitTable
from logitstore.errors import (
    ConfigError,
    IncompatibleStoreError,
    LogitStoreError,
    OutsideError,
    TeacherError,
    UnusableDocumentError,
)
from logitstore.records import Record
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
from logitstore.teacher.protocol import Teacher
from logitstore.unit_records import LeftOut, UnitCare, UnitScorer
from logitstore.unit_sequences import SequenceMaker, UnitBuild

_LOG = logging.getLogger(__name__)
# Documents of a unit that may be left out because the teacher cannot score them; each makes the unit begin anew.
MOST_UNUSABLE_DOCUMENTS = 8
# Of the disk that shards are assembled on: full, over a quota or a limit, read-only, broken.
_DISK_TROUBLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})


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
        self._scorer = UnitScorer(teacher, plan)
        self._fingerprint = plan.compute_fingerprint()
        self._units: UnitTable = plan.build_unit_table()

    def capture(self, unit: int, attempt: str | None = None, care: UnitCare | None = None) -> Receipt:
        """Run the teacher over a unit and commit its shard.

        A unit that is committed already is left as it is: its receipt says "lost", with counts of zero. A kill at any
        point leaves the unit either uncommitted (with garbage to collect at most) or committed whole.

        Args:
            unit: of the plan.
            attempt: a name that no other attempt has.
            care: where the teacher's engine has died of the unit before.
        Raises:
            TeacherError, InvalidSignalError: what the teacher said cannot be stored; nothing is committed. Documents
                whose logits are not finite, or that memory is too small for, do not lead here, up to a few of a unit:
                they become dead letters.
            TeacherLostError: the teacher's engine has died. With `care`, it names the document that it died of.
            OutsideError: the storage failed, or the folder where the shard is assembled has no room; nothing is
                committed.
        """
        started = time.monotonic()
        if self._files.exists(build_commit_path(unit)):
            return _build_lost_receipt(unit)
        attempt = attempt or build_attempt()
        build, shard, path = self._write_usable(unit, attempt, care)
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

    def _read_unit(self, unit: int, left_out: Mapping[str, LeftOut]) -> Iterator[Document | DeadLetter]:
        """The unit's documents, those that are left out as dead letters that say why."""
        for span in self._units.spans(unit):
            file = self._plan.files[span.file_index]
            for item in read_documents(file, span.start, span.stop, self._corpus, self._storage_options):
                if isinstance(item, Document) and item.document_id in left_out:
                    why = left_out[item.document_id]
                    yield item.reject(why.reason, why.detail)
                else:
                    yield item

    def _write_usable(
        self, unit: int, attempt: str, care: UnitCare | None
    ) -> tuple[UnitBuild, ShardSummary | None, str | None]:
        """Write the unit's shard without the documents that the teacher cannot score.

        Each of them costs the unit's scores up to there: with one document fewer, all records after it are others.
        Documents of the unit that share its id go with it. A teacher that can score none of a unit's documents, or too
        few, is not taken for one that is well.
        """
        left_out = {} if care is None else dict(care.left_out)
        while True:
            build = self._sequences.build(unit, self._read_unit(unit, left_out), is_careful=care is not None)
            try:
                shard, path = self._write(unit, attempt, build, is_careful=care is not None)
            except UnusableDocumentError as error:
                if error.document_id in left_out or len(left_out) >= MOST_UNUSABLE_DOCUMENTS:
                    raise
                _LOG.warning("unit %d goes on without a document: %s", unit, error)
                left_out[error.document_id] = LeftOut(reason=error.reason, detail=error.detail)
                continue
            if left_out and shard is None:
                listed = "; ".join(f"{document_id!r}: {why.detail}" for document_id, why in left_out.items())
                raise TeacherError(
                    f"teacher {self._plan.teacher.model!r}: expected to score a document of unit {unit} at least, "
                    f"found that it can score none ({listed}); try another dtype, less at a time, or check the weights"
                )
            return build, shard, path

    def _write(
        self, unit: int, attempt: str, build: UnitBuild, *, is_careful: bool
    ) -> tuple[ShardSummary | None, str | None]:
        """Assemble the shard beside us and upload it; (None, None) where the unit has no usable document."""
        # Closed on the way out: an engine would go on with answers that nobody waits for.
        with contextlib.closing(_iterate(build)) as sequences:
            first = next(sequences, None)
            if first is None:
                return None, None
            records = self._scorer.score(unit, itertools.chain([first], sequences), is_careful=is_careful)
            return self._write_records(unit, attempt, records)

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
        path = build_data_path(unit, attempt)
        with _open_spill_folder(self._spill_folder) as folder:
            spilled = folder / f"{unit:07d}.parquet"
            with _explain_spilling(folder):
                shard = write_shard(spilled, records, header, self._plan.shard)
            self._files.put_file(path, spilled)
        return shard, path


def _build_lost_receipt(unit: int) -> Receipt:
    return Receipt(
        unit=unit, outcome=Outcome.LOST, records=0, positions=0, bytes=0, documents=0, dead_letters=0, seconds=0.0
    )


def _iterate(build: UnitBuild) -> Generator[Sequence, None, None]:
    yield from build


@contextlib.contextmanager
def _open_spill_folder(parent: Path | None) -> Iterator[Path]:
    """A folder of its own for a shard, gone with everything in it in the end."""
    with _explain_spilling(parent):
        folder = tempfile.TemporaryDirectory(prefix="logitstore-", dir=parent, ignore_cleanup_errors=True)
    with folder as name:
        yield Path(name)


@contextlib.contextmanager
def _explain_spilling(folder: Path | None) -> Iterator[None]:
    """What is wrong with the disk that a shard is assembled on is wrong with this machine, not with the unit."""
    try:
        yield
    except OSError as error:
        is_gone = folder is None or not folder.is_dir()  # without a folder: there is none that can be written to
        if isinstance(error, LogitStoreError) or not (is_gone or error.errno in _DISK_TROUBLE):
            raise
        raise OutsideError(
            f"{folder or 'TMPDIR'}: expected room for a shard until it is uploaded, found {error}; make room there, or "
            "set TMPDIR to a larger disk"
        ) from error
