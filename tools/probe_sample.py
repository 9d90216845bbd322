"""The sample of a corpus that a probe scores: text of all its parts, tokenized or answered."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from cluster.settings import ClusterCaptureSettings
from logitstore.capture import MOST_UNUSABLE_DOCUMENTS
from logitstore.corpus.documents import Document
from logitstore.corpus.sequences import Sequence
from logitstore.errors import ConfigError, UnusableDocumentError
from logitstore.teacher.protocol import Teacher
from logitstore.unit_sequences import SequenceMaker
from tools.corpus_sample import CorpusPart, ListedCorpus, choose_parts, read_text_sample
from tools.endpoint_probe import find_endpoint_seconds
from tools.sampling import PartSample, choose_sequences

# Tokenizing is cheap beside scoring, and corpora differ more from file to file than within a file: many short looks.
_MOST_PARTS = 32
# Prompts that are answered, wherever they come from: an endpoint is paid for each of them.
_MOST_PROMPTS = 32
# Text read per position that is to be scored: more than enough, so that tokens per byte are known better than speed.
_BYTES_PER_POSITION = 8
LEAST_SAMPLE_BYTES = 2_097_152


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Tokenized text of every part of a corpus, and what it took."""

    parts: list[PartSample]
    chosen: list[Sequence]
    seconds: float


def take_sample(
    listed: ListedCorpus, teacher: Teacher, settings: ClusterCaptureSettings, probe_positions: int
) -> Sample:
    """Tokenize text of every part of the corpus, or let it be answered, and choose about `probe_positions` of it.

    Raises:
        ConfigError: the sample holds no usable document.
    """
    maker = SequenceMaker(
        teacher,
        chat=settings.corpus.chat,
        sequences=settings.sequences,
        generate=settings.generate,
        seed=settings.seed,
        has_given_ids=settings.corpus.given_ids is not None,
    )
    wanted_bytes = wanted_documents = math.inf
    if settings.generate is None:
        chosen_parts = choose_parts(listed, _MOST_PARTS)
        wanted_bytes = max(LEAST_SAMPLE_BYTES, _BYTES_PER_POSITION * probe_positions) // max(1, len(chosen_parts))
    else:  # answers are what takes time: few prompts have to do
        answers = probe_positions // (settings.generate.num_answers * settings.generate.max_new_tokens)
        num_prompts = max(1, min(_MOST_PROMPTS, answers))
        chosen_parts = choose_parts(listed, num_prompts)
        wanted_documents = max(1, num_prompts // max(1, len(chosen_parts)))
    started = time.perf_counter()
    parts = [_read_part(listed, part, wanted_bytes, wanted_documents, maker, settings) for part in chosen_parts]
    seconds = find_endpoint_seconds(teacher, parts, settings.teacher) or time.perf_counter() - started
    chosen = choose_sequences(parts, probe_positions)
    if not chosen:
        documents, dead_letters = (sum(getattr(part, name) for part in parts) for name in ("documents", "dead_letters"))
        raise ConfigError(
            f"corpus: expected usable documents, found {documents} documents and {dead_letters} dead letters in a "
            "sample; check files, and the fields that they are read by"
        )
    return Sample(parts=parts, chosen=chosen, seconds=seconds)


def _read_part(
    listed: ListedCorpus,
    part: CorpusPart,
    wanted_bytes: float,
    wanted_documents: float,
    maker: SequenceMaker,
    settings: ClusterCaptureSettings,
) -> PartSample:
    text = read_text_sample(listed, part.unit, wanted_bytes, settings, wanted_documents=wanted_documents)
    documents, num_rejected = list(text.documents), 0
    while True:
        build = maker.build(part.unit, documents)
        try:
            sequences = list(build)
            break
        except UnusableDocumentError as error:
            # As in a capture: what the teacher cannot answer becomes a dead letter, up to a few of them.
            is_it = [isinstance(item, Document) and item.document_id == error.document_id for item in documents]
            if num_rejected == MOST_UNUSABLE_DOCUMENTS or not any(is_it):
                raise
            num_rejected += 1
            documents = [
                item.reject(error.reason, error.detail) if isinstance(item, Document) and bad else item
                for item, bad in zip(documents, is_it, strict=True)
            ]
    return PartSample(
        source=part.source,
        stands_for_bytes=part.text_bytes,
        text_bytes=text.text_bytes,
        documents=build.num_documents,
        dead_letters=len(build.dead_letters),
        sequences=sequences,
    )
