"""What a student with another tokenizer makes of the records of a store, for the whole of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from logitstore.errors import ConfigError, IncompatibleStoreError
from logitstore.records import RecordBatch
from logitstore.store.logit_store import LogitStore
from logitstore.teacher.protocol import TeacherIdentity
from logitstore.teacher.tokenizer import TeacherTokenizer, load_tokenizer
from trainer.config import TrainSettings
from trainer.distributed import Processes
from trainer.stores import RunStores
from trainer.student import TOKENIZER_FILES
from trainer.vocabularies.batch import TranslatedBatch, collate_translated
from trainer.vocabularies.matching import TranslationCounts
from trainer.vocabularies.settings import OtherTokenizerSettings
from trainer.vocabularies.token_bytes import TokenBytes
from trainer.vocabularies.translation import Translator

_LOGGER = logging.getLogger(__name__)
# Of the text of a run: less than this in spans is worth a warning.
_ENOUGH_TEXT = 0.8


class StudentReader:
    """Records of a store in the tokens of a student.

    Attributes:
        tokenizer: the student's.
        vocab_size: ids of it; columns of the student's head from there on are padding.
    """

    def __init__(
        self, settings: OtherTokenizerSettings, stores: Sequence[LogitStore], *, student_model: str | None
    ) -> None:
        """Load both tokenizers.

        Args:
            settings: of the run.
            stores: of one teacher, its first one first; what is said about all has to be the same.
            student_model: name or folder of the student, whose tokenizer is taken where the settings name none.

        Raises:
            ConfigError: a tokenizer is not named, cannot be loaded or does not spell text; the method needs what a
                store does not have.
            IncompatibleStoreError: the teacher's tokenizer is not that of a store.
        """
        for store in stores:
            _check_store(settings, store)
        name = settings.tokenizer or student_model
        if name is None:
            raise ConfigError(
                "other_tokenizer.tokenizer: expected the name or folder of the student's tokenizer beside a student of "
                "fresh weights, found none"
            )
        teacher = _load_teacher_tokenizer(settings, stores)
        self.tokenizer = load_tokenizer(name)
        self.vocab_size = self.tokenizer.vocab_size
        self._is_sorted = settings.method == "sorted_probabilities"
        self._longest: int | None = None
        self._translator = Translator(
            TokenBytes(teacher),
            TokenBytes(self.tokenizer),
            sequence_length=min(store.plan.sequences.length for store in stores),
        )
        if self.tokenizer.fingerprint == teacher.fingerprint:
            _LOGGER.warning(
                "other_tokenizer: student and teacher have the same tokenizer, %r: without this setting the student "
                "learns the teacher's whole distribution instead",
                name,
            )

    def describe_as_teacher(self, teacher: TeacherIdentity) -> TeacherIdentity:
        """A teacher's identity with the student's vocabulary, for what makes a student to a teacher's measure."""
        return teacher.model_copy(
            update={
                "tokenizer": self.tokenizer.name,
                "tokenizer_fingerprint": self.tokenizer.fingerprint,
                "vocab_size": self.vocab_size,
                "padded_vocab_size": self.vocab_size,
                "end_of_text_id": self.tokenizer.end_of_text_id,
            }
        )

    def fit(self, student: PreTrainedModel) -> None:
        """Take in how much the student reads at once.

        Raises:
            IncompatibleStoreError: its head is narrower than its tokenizer's vocabulary.
        """
        config, head = student.config.get_text_config(), student.get_output_embeddings()
        width = config.vocab_size if head is None else head.weight.shape[0]
        if width < self.vocab_size:
            raise IncompatibleStoreError(
                f"student: its vocabulary is narrower than its tokenizer's\n  student:   {width} ids\n"
                f"  tokenizer: {self.vocab_size} ids, {self.tokenizer.name!r}\nset other_tokenizer.tokenizer to the "
                "one that the student was made with"
            )
        self._longest = getattr(config, "max_position_embeddings", None)

    def collate(self, batch: RecordBatch) -> TranslatedBatch:
        """Records, read with documents, as the student is taught them, on the CPU."""
        return collate_translated(
            batch, self._translator.translate(batch), longest=self._longest, with_support=self._is_sorted
        )


def open_student_reader(settings: TrainSettings, stores: RunStores) -> StudentReader | None:
    """The reader of a run whose student has another tokenizer; None of any other run."""
    if settings.other_tokenizer is None:
        return None
    return StudentReader(settings.other_tokenizer, stores.every, student_model=settings.student.model)


def find_student_reader(folder: str, store: LogitStore) -> StudentReader | None:
    """The reader of a finished student; None of one that has the teacher's tokenizer, or comes without any.

    Raises:
        ConfigError: the tokenizer of student or teacher cannot be loaded.
    """
    if Path(folder).is_dir() and not any((Path(folder) / name).exists() for name in TOKENIZER_FILES):
        return None
    if load_tokenizer(folder).fingerprint == store.plan.teacher.tokenizer_fingerprint:
        return None
    return StudentReader(OtherTokenizerSettings(method="spans"), [store], student_model=folder)


def log_counts(counts: TranslationCounts, processes: Processes) -> None:
    """Say on rank 0 what of its text was taught in spans, if it had any; as a warning where much was not.

    Its text alone: a run that failed has to come here too, with no other rank to wait for.
    """
    if processes.rank or not counts.text_bytes:
        return
    share = counts.span_bytes / counts.text_bytes
    _LOGGER.log(
        logging.INFO if share >= _ENOUGH_TEXT else logging.WARNING,
        "other_tokenizer: %.1f%% of %d bytes of text%s were in %d spans that teacher and student share; %d bytes are "
        "no UTF-8 or cut by the border of a record, the student's tokenizer changes %d, and the store does not know "
        "%d spans; the rest stands at the borders of records, or is not taught",
        100 * share,
        counts.text_bytes,
        " on rank 0" if processes.world_size > 1 else "",
        counts.spans,
        counts.undecodable_bytes,
        counts.respelled_bytes,
        counts.unknown_spans,
    )


def _check_store(settings: OtherTokenizerSettings, store: LogitStore) -> None:
    plan = store.plan
    if settings.method == "spans" and "next_token_logprob" in plan.unknown_scalars:
        raise ConfigError(
            "other_tokenizer.method: 'spans' needs the teacher's logprob of every next token, found a store whose "
            f"source did not tell them, {store.url}; capture it with a teacher, or choose 'sorted_probabilities'"
        )
    if settings.method == "sorted_probabilities" and (plan.is_drawn or not plan.is_likeliest_kept):
        raise ConfigError(
            f"other_tokenizer.method: 'sorted_probabilities' needs the teacher's likeliest ids, found a store of the "
            f"method {plan.method.kind!r}, {store.url}; choose 'spans', which needs the logprob of the next token alone"
        )


def _load_teacher_tokenizer(settings: OtherTokenizerSettings, stores: Sequence[LogitStore]) -> TeacherTokenizer:
    name = settings.teacher_tokenizer or stores[0].plan.teacher.tokenizer_name
    try:
        teacher = load_tokenizer(name)
    except ConfigError as error:
        raise ConfigError(
            f"{error}\nwithout the teacher's tokenizer its ids are no text: set other_tokenizer.teacher_tokenizer to "
            "where it lies"
        ) from error
    for store in stores:
        if teacher.fingerprint != store.plan.teacher.tokenizer_fingerprint:
            raise IncompatibleStoreError(
                f"other_tokenizer: {name!r} is not the tokenizer that a store was captured with\n"
                f"  tokenizer: {teacher.fingerprint}\n  store:     {store.plan.teacher.tokenizer_fingerprint}, in "
                f"{store.url}\nset other_tokenizer.teacher_tokenizer to the one that the teacher reads with"
            )
    return teacher
