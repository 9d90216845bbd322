"""What a capture makes of the documents of a unit: sequences of them, or of answers to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from logitstore.answers import AnswerBuild
from logitstore.corpus.chat_settings import ChatSettings
from logitstore.corpus.documents import DeadLetter, Document
from logitstore.corpus.sequences import Sequence, SequenceSettings, build_sequences
from logitstore.errors import ConfigError
from logitstore.given_sequences import GivenBuild
from logitstore.teacher.generation import GenerationSettings
from logitstore.teacher.protocol import GeneratingTeacher, Teacher
from logitstore.told_answers import TellingTeacher, ToldAnswerBuild


class UnitBuild(Protocol):
    """Sequences of a unit, to be iterated once, and counts, complete after that; see `SequenceBuild`."""

    num_documents: int
    num_recorded_documents: int
    dead_letters: list[DeadLetter]

    def __iter__(self) -> Iterator[Sequence]: ...


class SequenceMaker:
    """Makes the sequences of units for one teacher.

    Args:
        teacher: encodes, and writes answers.
        chat: how conversations are rendered; None where documents are texts.
        sequences: mode and length.
        generate: how answers are written; None where documents are taught as they are.
        seed: of the plan.
        has_given_ids: whether documents are token ids.
    Raises:
        ConfigError: the tokenizer's template cannot do what is asked of it, or the teacher does not write answers.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        chat: ChatSettings | None,
        sequences: SequenceSettings,
        generate: GenerationSettings | None,
        seed: int,
        has_given_ids: bool = False,
    ) -> None:
        self._teacher = teacher
        self._settings = sequences
        self._seed = seed
        self._has_given_ids = has_given_ids
        self._template = None if chat is None else teacher.tokenizer.open_chat(chat)
        self._generate = generate
        self._stop_ids: frozenset[int] = frozenset()
        if self._template is not None and generate is None:
            self._template.check()
        if self._template is not None and generate is not None:
            self._template.check_prompts()
            closing_id = self._template.find_closing_id()
            self._stop_ids = frozenset() if closing_id is None else frozenset({closing_id})
        if generate is None and isinstance(teacher, TellingTeacher):
            raise ConfigError(
                f"generate: expected answers to be asked of engine {teacher.identity.engine!r}, which scores no texts, "
                "found none; add a `generate` section, if it is no more than `generate: {}`"
            )
        if generate is not None and not isinstance(teacher, GeneratingTeacher | TellingTeacher):
            raise ConfigError(
                f"generate: expected a teacher that writes answers, found engine {teacher.identity.engine!r}, which "
                "only scores texts; set teacher.engine to huggingface, or leave out generate"
            )

    def build(self, unit: int, documents: Iterable[Document | DeadLetter], *, is_careful: bool = False) -> UnitBuild:
        """Sequences of a unit's documents, in corpus order, made as they are asked for.

        With `is_careful`, an engine that writes answers is asked about one document at a time.
        """
        identity = self._teacher.identity
        if self._generate is not None:
            arguments: dict[str, Any] = {
                "settings": self._generate,
                "template": self._template,
                "stop_ids": self._stop_ids,
                "seed": self._seed,
                "unit": unit,
                "length": self._settings.length,
            }
            if isinstance(self._teacher, TellingTeacher):
                return ToldAnswerBuild(documents, teacher=self._teacher, **arguments)
            assert isinstance(self._teacher, GeneratingTeacher), "checked above"
            return AnswerBuild(documents, teacher=self._teacher, is_careful=is_careful, **arguments)
        if self._has_given_ids:
            return GivenBuild(documents, vocab_size=identity.vocab_size, settings=self._settings)
        return build_sequences(
            documents,
            encode=self._teacher.encode,
            end_of_text_id=identity.end_of_text_id,
            vocab_size=identity.vocab_size,
            settings=self._settings,
            encode_chat=None if self._template is None else self._template.encode,
        )
