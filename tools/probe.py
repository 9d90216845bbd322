"""A probe: a sample of a capture's corpus goes through its teacher and into a shard, with a clock beside it."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.settings import ClusterCaptureSettings
from logitstore.corpus.sequences import Sequence, build_sequences
from logitstore.errors import ConfigError
from logitstore.records import Record, RecordAddress
from logitstore.settings import Settings
from logitstore.shard.layout import FORMAT_VERSION, ShardHeader
from logitstore.shard.summary import ShardSummary
from logitstore.shard.writer import write_shard
from logitstore.teacher.loading import load_teacher
from logitstore.teacher.protocol import Teacher
from tools.corpus_sample import ListedCorpus, choose_units, list_corpus, read_text_sample
from tools.estimate import CorpusFigures, Estimate, ProbeFigures, estimate_capture

_MOST_SAMPLES = 8
# Text read per position that is to be scored: more than enough, so that tokens per byte are known better than speed.
_BYTES_PER_POSITION = 8
_LEAST_SAMPLE_BYTES = 65_536


class CaptureOutlook(Settings):
    """What `logitstore plan` finds: the corpus as listed, what was measured, and what is extrapolated from both."""

    store: str
    teacher: str
    corpus: CorpusFigures
    probe: ProbeFigures
    estimate: Estimate


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sample:
    """Tokenized text, and what it took."""

    sequences: list[Sequence]
    units: int
    text_bytes: int
    documents: int
    dead_letters: int
    positions: int
    seconds: float


def run_plan(
    settings: ClusterCaptureSettings,
    *,
    probe_positions: int,
    price_per_hour: float | None = None,
    report: Callable[..., None] = lambda done, total: None,
) -> CaptureOutlook:
    """List a capture's corpus, probe its teacher on this machine, and extrapolate.

    Args:
        settings: of the capture.
        probe_positions: about how many positions to score; at least one sequence.
        price_per_hour: of one actor.
        report: called with (positions done, positions in all).

    Raises:
        ConfigError, TeacherError, OutsideError: the capture would fail in the same way, or there is nothing to capture.
    """
    listed = list_corpus(settings)
    started = time.perf_counter()
    teacher = load_teacher(settings.teacher, settings.method)
    load_seconds = time.perf_counter() - started
    with _threads_of_an_actor(settings) as device:
        sample = take_sample(listed, teacher, settings, probe_positions)
        probe = probe_teacher(teacher, sample, settings, load_seconds=load_seconds, device=device, report=report)
    corpus = CorpusFigures(
        files=len(listed.files),
        stored_bytes=sum(file.bytes for file in listed.files),
        text_bytes=sum(listed.text_bytes),
        units=len(listed.units),
    )
    estimate = estimate_capture(corpus, probe, actors=settings.actors.count or 1, price_per_hour=price_per_hour)
    return CaptureOutlook(
        store=settings.store, teacher=settings.teacher.model, corpus=corpus, probe=probe, estimate=estimate
    )


@contextlib.contextmanager
def _threads_of_an_actor(settings: ClusterCaptureSettings) -> Iterator[str]:
    """Compute with as many threads as an actor has; yields a name of the device."""
    wants_gpu = settings.teacher.device != "cpu" and torch.cuda.is_available()
    if wants_gpu:
        yield torch.cuda.get_device_name()
        return
    threads = max(1, int(settings.actors.cpus or min(2, os.cpu_count() or 1)))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    finally:
        torch.set_num_threads(before)


def take_sample(
    listed: ListedCorpus, teacher: Teacher, settings: ClusterCaptureSettings, probe_positions: int
) -> _Sample:
    """Tokenize text of evenly spread units, and choose about `probe_positions` of it to be scored.

    Raises:
        ConfigError: the sample holds no usable document.
    """
    units = choose_units(len(listed.units), min(_MOST_SAMPLES, max(1, probe_positions // settings.sequences.length)))
    budget = max(1, probe_positions // max(1, len(units)))
    started = time.perf_counter()
    chosen: list[Sequence] = []
    text_bytes = documents = dead_letters = positions = 0
    for unit in units:
        text = read_text_sample(listed, unit, max(_LEAST_SAMPLE_BYTES, _BYTES_PER_POSITION * budget), settings)
        build = build_sequences(
            text.documents,
            encode=teacher.encode,
            end_of_text_id=teacher.identity.end_of_text_id,
            vocab_size=teacher.identity.vocab_size,
            settings=settings.sequences,
        )
        taken = 0
        for sequence in build:
            positions += sequence.num_positions
            if taken < budget:
                chosen.append(sequence)
                taken += sequence.num_positions
        text_bytes += text.text_bytes
        documents += build.num_documents
        dead_letters += len(build.dead_letters)
    if not chosen:
        raise ConfigError(
            f"corpus: expected usable documents, found {documents} documents and {dead_letters} dead letters in a "
            "sample; check files and text_field"
        )
    return _Sample(
        sequences=chosen,
        units=len(units),
        text_bytes=text_bytes,
        documents=documents,
        dead_letters=dead_letters,
        positions=positions,
        seconds=time.perf_counter() - started,
    )


def probe_teacher(
    teacher: Teacher,
    sample: _Sample,
    settings: ClusterCaptureSettings,
    *,
    load_seconds: float,
    device: str,
    report: Callable[..., None],
) -> ProbeFigures:
    """Score a sample and write it into a shard in a temporary folder, as one actor does with a unit."""
    header = ShardHeader(
        format_version=FORMAT_VERSION,
        unit=0,
        plan_fingerprint="0" * 64,
        vocab_size=teacher.identity.vocab_size,
        codec=settings.shard.codec,
    )
    for _ in teacher.score([sample.sequences[0].token_ids]):
        pass  # the first pass sets things up that the others find ready
    with tempfile.TemporaryDirectory(prefix="logitstore-plan-") as folder:
        path = Path(folder) / "probe.parquet"
        started = time.perf_counter()
        shard = write_shard(path, _score(teacher, sample.sequences, report), header, settings.shard)
        seconds = time.perf_counter() - started
    return ProbeFigures(
        units=sample.units,
        text_bytes=sample.text_bytes,
        documents=sample.documents,
        dead_letters=sample.dead_letters,
        tokenized_positions=sample.positions,
        tokenize_seconds=sample.seconds,
        scored_positions=shard.positions,
        scored_records=shard.records,
        score_seconds=seconds,
        row_group_bytes=sum(row_group.bytes for row_group in shard.row_groups),
        footer_bytes=shard.bytes - shard.footer_offset,
        support_entries=sum(row_group.support_entries for row_group in shard.row_groups),
        teacher_loss=_compute_loss(shard),
        load_seconds=load_seconds,
        device=device,
    )


def _score(teacher: Teacher, sequences: list[Sequence], report: Callable[..., None]) -> Iterator[Record]:
    total = sum(sequence.num_positions for sequence in sequences)
    done = 0
    report(done, total)
    signals = teacher.score([sequence.token_ids for sequence in sequences])
    for index, (sequence, signal) in enumerate(zip(sequences, signals, strict=True)):
        yield Record(
            address=RecordAddress(unit=0, index=index),
            token_ids=sequence.token_ids,
            loss_mask=sequence.loss_mask,
            signal=signal,
            documents=sequence.documents,
        )
        done += sequence.num_positions
        report(done, total)


def _compute_loss(shard: ShardSummary) -> float:
    logprob_sum = sum(row_group.next_token_logprob_sum for row_group in shard.row_groups)
    possible = sum(row_group.positions - row_group.impossible_tokens for row_group in shard.row_groups)
    return -logprob_sum / max(1, possible)
