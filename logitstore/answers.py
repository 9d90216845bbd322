"""Answers of the teacher to the documents of a unit, as sequences."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from logitstore.corpus.documents import DeadLetter, Document
from logitstore.corpus.rejection import RejectedDocumentError
from logitstore.corpus.sequences import Sequence
from logitstore.errors import TeacherLostError, UnusableDocumentError, UnusableSequenceError
from logitstore.records import DocumentSpan
from logitstore.teacher.generation import Answer, GenerationSettings, build_answer_key
from logitstore.teacher.protocol import GeneratingTeacher

if TYPE_CHECKING:  # it imports transformers
    from logitstore.teacher.chat_template import ChatTemplate

# Answers asked of the teacher at a time: few enough prompts to hold, and so many that an engine which begins an answer
# wherever another ends does not often wait for the last and longest.
_PROMPTS_AT_A_TIME = 4096


@dataclass(frozen=True, slots=True)
class _Prompt:
    number: int
    document: Document
    token_ids: np.ndarray


class AnswerBuild:
    """Sequences of prompts with their answers. Iterate once; the counts are complete when the iteration has ended.

    What is counted are answers: a prompt that can be used stands for `num_answers` documents, any other for one.

    Args:
        documents: of a unit, in corpus order; dead letters are passed on.
        teacher: writes the answers.
        settings: how.
        template: for conversations as prompts; None for texts.
        stop_ids: tokens that end an answer, besides those that the teacher knows.
        seed, unit: what the answers are a function of, besides prompt and teacher.
        length: positions of a sequence; a prompt that leaves no room for the longest answer is a dead letter.
        is_careful: ask for the answers to one prompt at a time, so that it is known which one an engine dies of.

    Attributes:
        num_documents, num_recorded_documents, dead_letters: see `SequenceBuild`.
    """

    def __init__(
        self,
        documents: Iterable[Document | DeadLetter],
        *,
        teacher: GeneratingTeacher,
        settings: GenerationSettings,
        template: ChatTemplate | None,
        stop_ids: Collection[int],
        seed: int,
        unit: int,
        length: int,
        is_careful: bool = False,
    ) -> None:
        self.num_documents = 0
        self.num_recorded_documents = 0
        self.dead_letters: list[DeadLetter] = []
        self._teacher = teacher
        self._settings = settings
        self._template = template
        self._stop_ids = stop_ids
        self._seed = seed
        self._unit = unit
        self._most_prompt_tokens = length + 1 - settings.max_new_tokens
        self._prompts_at_a_time = 1 if is_careful else max(1, _PROMPTS_AT_A_TIME // settings.num_answers)
        self._sequences = self._build(documents)

    def __iter__(self) -> Iterator[Sequence]:
        return self._sequences

    def _build(self, documents: Iterable[Document | DeadLetter]) -> Iterator[Sequence]:
        prompts = self._read_prompts(documents)
        while group := list(itertools.islice(prompts, self._prompts_at_a_time)):
            asked = [(prompt, number) for prompt in group for number in range(self._settings.num_answers)]
            keys = [build_answer_key(self._seed, self._unit, prompt.number, number) for prompt, number in asked]
            answers = self._generate([prompt for prompt, _ in asked], keys)
            for (prompt, number), answer in zip(asked, answers, strict=True):
                self.num_documents += 1
                if answer.is_empty:
                    detail = f"answer {number}: expected a token before the end, found none"
                    self.dead_letters.append(prompt.document.reject("empty_answer", detail))
                    continue
                self.num_recorded_documents += 1
                yield _join(prompt, number, answer)

    def _generate(self, prompts: list[_Prompt], keys: list[int]) -> Iterator[Answer]:
        token_ids = [prompt.token_ids for prompt in prompts]
        try:
            yield from self._teacher.generate(token_ids, self._settings, keys, self._stop_ids)
        except UnusableSequenceError as error:
            raise UnusableDocumentError(prompts[error.sequence].document.document_id, error) from error
        except TeacherLostError as error:
            if self._prompts_at_a_time == 1:
                error.document_id = prompts[0].document.document_id
            raise

    def _read_prompts(self, documents: Iterable[Document | DeadLetter]) -> Iterator[_Prompt]:
        for number, document in enumerate(documents):
            prompt = self._encode(number, document) if isinstance(document, Document) else document
            if isinstance(prompt, DeadLetter):
                self.num_documents += 1
                self.dead_letters.append(prompt)
            else:
                yield prompt

    def _encode(self, number: int, document: Document) -> _Prompt | DeadLetter:
        if document.conversation is None:
            token_ids = np.array(self._teacher.tokenizer.encode_prompts([document.text])[0], dtype=np.int64)
        else:
            assert self._template is not None, "a chat corpus comes with a template"
            try:
                token_ids = self._template.encode_prompt(document.conversation)
            except RejectedDocumentError as rejection:
                return document.reject(rejection.reason, rejection.detail)
        if not len(token_ids):
            return document.reject("too_short", "expected a prompt of at least 1 token, found none")
        if len(token_ids) > self._most_prompt_tokens:
            detail = f"expected a prompt of at most {self._most_prompt_tokens} tokens, found {len(token_ids)}"
            return document.reject("too_long", detail)
        vocab_size = self._teacher.identity.vocab_size
        if token_ids.min() < 0 or token_ids.max() >= vocab_size:
            detail = f"expected ids below {vocab_size}, found {token_ids.min()} to {token_ids.max()}"
            return document.reject("token_out_of_range", detail)
        return _Prompt(number, document, token_ids.astype(np.int32))


def name_answer(document_id: str, number: int, *, is_finished: bool) -> str:
    """Document id of an answer: that of its prompt, `?answer=` with its 0-based number, and `&cut` if it has no end."""
    return f"{document_id}?answer={number}{'' if is_finished else '&cut'}"


def strip_answer(document_id: str) -> str:
    """Undo `name_answer`: the id of the prompt."""
    return document_id.rpartition("?answer=")[0]


def _join(prompt: _Prompt, number: int, answer: Answer) -> Sequence:
    is_answer = np.repeat([False, True], [len(prompt.token_ids), len(answer.token_ids)])
    document_id = name_answer(prompt.document.document_id, number, is_finished=answer.is_finished)
    return Sequence(
        token_ids=np.concatenate([prompt.token_ids, answer.token_ids]).astype(np.int32),
        loss_mask=is_answer[1:],
        documents=(DocumentSpan(document_id=document_id, start=0, document_offset=0, label=prompt.document.label),),
    )
