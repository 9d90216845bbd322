"""Records of a unit's sequences: what the teacher says about them, and which document it fails at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from logitstore.answers import strip_answer
from logitstore.corpus.documents import DeadLetterReason
from logitstore.corpus.sequences import Sequence
from logitstore.errors import TeacherLostError, UnusableDocumentError, UnusableSequenceError
from logitstore.given_sequences import score_sequences
from logitstore.records import Record, RecordAddress, Signal
from logitstore.store.plan import StorePlan
from logitstore.teacher.draw_key import build_draw_key
from logitstore.teacher.protocol import Teacher
from logitstore.told_answers import ToldSequence

# Positions handed to the teacher at a time: enough for it to sort into even batches, little enough to hold.
_POSITIONS_AT_A_TIME = 131_072


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Why a document is not given to the teacher: what its dead letter says."""

    reason: DeadLetterReason
    detail: str


@dataclass(frozen=True, kw_only=True)
class UnitCare:
    """How to capture a unit that an engine has died of: nothing else beside a document, so that it is known which.

    Attributes:
        left_out: documents, by their ids, that are known to be the cause.
    """

    left_out: Mapping[str, LeftOut] = field(default_factory=dict)


class UnitScorer:
    """Makes records of sequences with one teacher, for one plan."""

    def __init__(self, teacher: Teacher, plan: StorePlan) -> None:
        self._teacher, self._plan = teacher, plan

    def score(self, unit: int, sequences: Iterator[Sequence], *, is_careful: bool = False) -> Iterator[Record]:
        """Yield the records of a unit, in order.

        Args:
            unit: that the sequences are of.
            sequences: all of the unit's.
            is_careful: whether the teacher is asked about one sequence at a time, and about each of its documents
                before; it is asked about twice as much.
        Raises:
            UnusableDocumentError: the teacher cannot score a document, and can others.
            TeacherLostError: its engine has died; names the document if it was alone with it.
        """
        index = 0
        for group in _group_sequences(sequences, 1 if is_careful else _POSITIONS_AT_A_TIME):
            try:
                if is_careful:
                    self._try_documents(group[0])
                for sequence, signal in zip(group, self._find_signals(unit, index, group), strict=True):
                    yield Record(
                        address=RecordAddress(unit=unit, index=index),
                        token_ids=sequence.token_ids,
                        loss_mask=sequence.loss_mask,
                        signal=signal,
                        documents=sequence.documents,
                    )
                    index += 1
            except UnusableSequenceError as error:
                document_id = self._find_unusable_document(group[error.sequence], error)
                raise UnusableDocumentError(self._strip(document_id), error) from error
            except TeacherLostError as error:
                if is_careful:
                    error.document_id = self._strip(error.document_id or _find_longest_document(group[0]))
                raise

    def _find_signals(self, unit: int, index: int, group: list[Sequence]) -> Iterator[Signal]:
        """What the teacher says about sequences; `index` is that of the first in its unit."""
        told = [sequence.signal for sequence in group if isinstance(sequence, ToldSequence)]
        if told:
            return iter(told)  # all of a unit or none
        keys = [build_draw_key(self._plan.seed, unit, index + i) for i in range(len(group))]
        return score_sequences(self._teacher, group, keys)

    def _find_unusable_document(self, sequence: Sequence, error: UnusableSequenceError) -> str:
        """Id of the document of a sequence that the teacher fails at on its own, or else of a suspect.

        For lack of memory that is the longest one. A position where logits are not finite may accuse the document
        before: attention kernels multiply NaN by weights of 0.
        """
        for document_id, start, stop in _list_parts(sequence):
            try:
                self._try(sequence, start, stop)
            except UnusableSequenceError:
                return document_id
        if error.reason == "out_of_memory":
            return _find_longest_document(sequence)
        return next(span for span in reversed(sequence.documents) if span.start <= error.position).document_id

    def _try_documents(self, sequence: Sequence) -> None:
        """Let the teacher score every document of a sequence on its own; names the one that its engine dies of."""
        for document_id, start, stop in _list_parts(sequence):
            try:
                self._try(sequence, start, stop)
            except UnusableSequenceError:
                return  # found again, and dealt with, in its sequence
            except TeacherLostError as error:
                error.document_id = document_id
                raise

    def _try(self, sequence: Sequence, start: int, stop: int) -> None:
        if len(sequence.documents) > 1 and stop > start:
            list(self._teacher.score([sequence.token_ids[start : stop + 1]], [0]))

    def _strip(self, document_id: str) -> str:
        """The document that is answered by an answer; any other is itself."""
        return strip_answer(document_id) if self._plan.generate else document_id


def _list_parts(sequence: Sequence) -> list[tuple[str, int, int]]:
    """Id, first position and the one behind the last of every document of a sequence."""
    starts = [span.start for span in sequence.documents]
    stops = [*starts[1:], len(sequence.token_ids) - 1]
    return [(span.document_id, span.start, stop) for span, stop in zip(sequence.documents, stops, strict=True)]


def _find_longest_document(sequence: Sequence) -> str:
    return max(_list_parts(sequence), key=lambda part: part[2] - part[1])[0]


def _group_sequences(sequences: Iterator[Sequence], most_positions: int) -> Iterator[list[Sequence]]:
    group: list[Sequence] = []
    positions = 0
    for sequence in sequences:
        group.append(sequence)
        positions += len(sequence.loss_mask)
        if positions >= most_positions:
            yield group
            group, positions = [], 0
    if group:
        yield group
