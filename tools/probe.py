"""A probe: a sample of a capture's corpus goes through its teacher and into a shard, with a clock beside it."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cluster.settings import ClusterCaptureSettings
from logitstore.capture import MOST_UNUSABLE_DOCUMENTS
from logitstore.corpus.sequences import Sequence
from logitstore.errors import UnusableSequenceError
from logitstore.given_sequences import score_sequences
from logitstore.planning import check_teacher_fits, find_unknown_scalars
from logitstore.records import Record, RecordAddress
from logitstore.settings import Settings
from logitstore.shard.layout import FORMAT_VERSION, ShardHeader
from logitstore.shard.summary import ShardSummary
from logitstore.shard.writer import write_shard
from logitstore.teacher.draw_key import build_draw_key
from logitstore.teacher.loading import load_teacher
from logitstore.teacher.protocol import Teacher
from logitstore.told_answers import ToldSequence
from tools.corpus_sample import list_corpus
from tools.endpoint_probe import describe_endpoint, price_answers
from tools.estimate import Assumptions, CorpusFigures, Estimate, ProbeFigures, estimate_capture
from tools.prices import PriceTable, price_actor_hour
from tools.probe_sample import Sample, take_sample
from tools.sampling import estimate_ratio

_LOG = logging.getLogger(__name__)


class CaptureOutlook(Settings):
    """What `logitstore plan` finds: the corpus as listed, what was measured, and what is extrapolated from both."""

    store: str
    teacher: str
    corpus: CorpusFigures
    probe: ProbeFigures
    is_speed_given: bool
    estimate: Estimate
    prices_file: str


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What `logitstore plan` is told beside the capture.

    Attributes:
        prices, prices_file: the price table, and where it was read.
        probe_positions: about how many positions to score; at least one sequence.
        price_per_hour: of one actor, instead of the table's.
        machine: a GPU of the table, or "cpu", where the probe runs on another machine than the capture.
        positions_per_second: of one actor there.
        upload_bytes_per_second: of one actor.
    """

    prices: PriceTable
    prices_file: Path
    probe_positions: int = 32_768
    price_per_hour: float | None = None
    machine: str | None = None
    positions_per_second: float | None = None
    upload_bytes_per_second: float | None = None


@dataclass(frozen=True, kw_only=True)
class ActorShare:
    """How many actors there are, and what each has; `device` is a name, with the number of threads for a CPU."""

    actors: int
    cpus: float
    gpus: float
    device: str


def run_plan(
    settings: ClusterCaptureSettings,
    options: PlanOptions,
    *,
    report: Callable[..., None] = lambda done, total: None,
) -> CaptureOutlook:
    """List a capture's corpus, probe its teacher on this machine, and extrapolate.

    Args:
        settings: of the capture.
        options: prices, and what is known better than it can be measured here.
        report: called with (positions done, positions in all).

    Raises:
        ConfigError, TeacherError, OutsideError: the capture would fail in the same way, or there is nothing to capture.
    """
    share = find_actors(settings)
    actor_hour = options.price_per_hour
    if actor_hour is None:
        actor_hour = price_actor_hour(
            options.prices, device=share.device, cpus=share.cpus, gpus=share.gpus, machine=options.machine
        )
    listed = list_corpus(settings)
    started = time.perf_counter()
    teacher = load_teacher(settings.teacher, settings.method, settings.sequences.length, generate=settings.generate)
    load_seconds = time.perf_counter() - started
    # Some engines hold processes, connections, files.
    with _compute_like_an_actor(share), contextlib.ExitStack() as loaded:
        loaded.callback(getattr(teacher, "close", lambda: None))
        check_teacher_fits(settings, teacher.identity)
        sample = take_sample(listed, teacher, settings, options.probe_positions)
        probe = probe_teacher(teacher, sample, settings, load_seconds=load_seconds, device=share.device, report=report)
    corpus = CorpusFigures(
        files=len(listed.files),
        stored_bytes=sum(file.bytes for file in listed.files),
        text_bytes=int(listed.unit_bytes.sum()),
        units=len(listed.units),
    )
    given = Assumptions(
        actors=share.actors,
        cpus=share.cpus,
        gpus=share.gpus,
        positions_per_second=options.positions_per_second,
        upload_bytes_per_second=options.upload_bytes_per_second,
        actor_hour=actor_hour,
        prices=options.prices,
    )
    return CaptureOutlook(
        store=settings.store,
        teacher=settings.teacher.model,
        corpus=corpus,
        probe=probe,
        is_speed_given=options.positions_per_second is not None,
        estimate=estimate_capture(corpus, probe, given),
        prices_file=str(options.prices_file),
    )


def find_actors(settings: ClusterCaptureSettings) -> ActorShare:
    """The actors that a capture would start on machines like this one, taken to be all as in its first group."""
    from cluster.placement import build_demand, count_actors

    uses_gpu = settings.teacher.device != "cpu" and settings.actors.gpus != 0 and torch.cuda.is_available()
    node = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count()) if uses_gpu else 0.0}
    groups = settings.actors.list_groups()
    demands = [build_demand(group, [node]) for group in groups]
    demand = demands[0]
    threads = max(1, int(demand.cpus))
    return ActorShare(
        actors=sum(count_actors(group, each, [node]) for group, each in zip(groups, demands, strict=True)),
        cpus=demand.cpus,
        gpus=demand.gpus,
        device=describe_endpoint(settings.teacher)
        or (torch.cuda.get_device_name() if uses_gpu else f"CPU, {threads} thread{'s' if threads > 1 else ''}"),
    )


@contextlib.contextmanager
def _compute_like_an_actor(share: ActorShare) -> Iterator[None]:
    """On a CPU, with as many threads as an actor has."""
    before = torch.get_num_threads()
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, int(share.cpus)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def probe_teacher(
    teacher: Teacher,
    sample: Sample,
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
        is_drawn=settings.method.is_drawn,
        temperatures=settings.method.temperatures,
        unknown_scalars=find_unknown_scalars(settings.teacher),
        has_labels=settings.corpus.label_field is not None,
    )
    if not isinstance(sample.chosen[0], ToldSequence):
        with contextlib.suppress(UnusableSequenceError):
            for _ in score_sequences(teacher, sample.chosen[:1], [0]):
                pass  # the first pass sets things up that the others find ready
    with tempfile.TemporaryDirectory(prefix="logitstore-plan-") as folder:
        write = partial(write_shard, Path(folder) / "probe.parquet", header=header, settings=settings.shard)
        shard, seconds = _write_usable(teacher, sample.chosen, write, report)
    ratio = estimate_ratio(sample.parts)
    return ProbeFigures(
        units=len(sample.parts),
        text_bytes=sum(part.text_bytes for part in sample.parts),
        documents=sum(part.documents for part in sample.parts),
        dead_letters=sum(part.dead_letters for part in sample.parts),
        dead_letter_share=ratio.dead_letter_share,
        tokenized_positions=sum(part.positions for part in sample.parts),
        positions_per_byte=ratio.positions_per_byte,
        positions_error=ratio.relative_error,
        tokenize_seconds=sample.seconds,
        scored_positions=shard.positions,
        scored_records=shard.records,
        score_seconds=seconds,
        row_group_bytes=sum(row_group.bytes for row_group in shard.row_groups),
        footer_bytes=shard.bytes - shard.footer_offset,
        support_entries=sum(row_group.support_entries for row_group in shard.row_groups),
        teacher_loss=None if "next_token_logprob" in header.unknown_scalars else _compute_loss(shard),
        load_seconds=load_seconds,
        device=device,
        endpoint_cost_per_byte=price_answers(sample.parts, settings.teacher),
    )


def _write_usable(
    teacher: Teacher, sequences: list[Sequence], write: Callable[..., ShardSummary], report: Callable[..., None]
) -> tuple[ShardSummary, float]:
    """Write a shard of the sequences that the teacher can score, and time what is in it.

    Raises:
        UnusableSequenceError: it can score none of them, or fails at more than a capture would do without.
    """
    for num_left_out in range(MOST_UNUSABLE_DOCUMENTS + 1):
        started = time.perf_counter()
        try:
            return write(records=_score(teacher, sequences, report)), time.perf_counter() - started
        except UnusableSequenceError as error:
            if len(sequences) == 1 or num_left_out == MOST_UNUSABLE_DOCUMENTS:
                raise
            _LOG.warning(
                "the sample goes on without a sequence of document %r: %s",
                sequences[error.sequence].documents[0].document_id,
                error,
            )
            sequences = [sequence for i, sequence in enumerate(sequences) if i != error.sequence]
    raise AssertionError("the last turn returns or raises")


def _score(teacher: Teacher, sequences: list[Sequence], report: Callable[..., None]) -> Iterator[Record]:
    total = sum(sequence.num_positions for sequence in sequences)
    done = 0
    report(done, total)
    told = [sequence.signal for sequence in sequences if isinstance(sequence, ToldSequence)]
    draw_keys = [build_draw_key(0, 0, index) for index in range(len(sequences))]
    signals = told or score_sequences(teacher, sequences, draw_keys)
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
