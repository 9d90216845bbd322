"""A run: what lives as long as a call of `train`, prepared from settings or a checkpoint."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from logitstore.records import RecordBatch
from logitstore.store.logit_store import LogitStore
from logitstore.stream.batches import first_slots
from logitstore.stream.iterator import RecordStream
from logitstore.stream.subset import RecordSubset
from logitstore.teacher.protocol import TeacherIdentity
from trainer.batch import TrainBatch
from trainer.checkpoint import (
    CheckpointHeader,
    agree_on_checkpoint,
    check_same_run,
    load_state,
    read_header,
    save_checkpoint,
)
from trainer.config import TrainSettings, check_batch_divides
from trainer.distributed import Processes
from trainer.divergence import SkippedSteps
from trainer.document_weights import DocumentWeights
from trainer.evaluate import Evaluation, evaluate_records
from trainer.optimizer import Optimizers, build_optimizer
from trainer.packing import check_packing
from trainer.parallel import (
    enable_activation_checkpointing,
    gather_state,
    is_sharded,
    prepare_evaluation,
    spread_student,
    unwrap_student,
)
from trainer.prefetch import Prefetcher, PreparedStep, StepFeed
from trainer.sources import open_stream, read_records, select_sources
from trainer.stores import (
    RunStores,
    check_loss_fits_stores,
    check_slots_fit_stores,
    list_manifests,
    open_pinned_stores,
)
from trainer.student import build_student, check_student_fits
from trainer.taught_student import TaughtStudent
from trainer.teachers import collate_signals
from trainer.vocabularies.evaluation import evaluate_translated
from trainer.vocabularies.student_reader import StudentReader, log_counts, open_student_reader
from trainer.vocabularies.taught_student import TranslatedStudent

_LOGGER = logging.getLogger(__name__)
# Sequences per forward pass of an evaluation where the run has no micro-batch of its own.
_EVALUATION_SEQUENCES = 8
# Settings that may change when a run goes on: where it reads and writes, how it is cut up, what it reports. Stores
# and tables of weights count by fingerprints of what is in them.
_FREE_SETTINGS = frozenset(
    {
        "store",
        "manifest",
        "further_teachers",
        "further_corpora",
        "skip_steps",
        "cache",
        "document_weights",
        "micro_batch_sequences",
        "micro_batch_tokens",
        "pack_sequences",
        "stream",
        "fused_loss",
        "parallel",
        "activation_checkpointing",
        "max_skipped_steps",
        "evaluate_every",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "log_records",
        "output",
        "device",
    }
)


@dataclass(kw_only=True, eq=False)
class Run:
    """What lives as long as a run.

    `step` counts the optimizer steps done, those that were `skipped` included, `positions` what was trained on.

    The steps come from `feed`: one of its own over `stream`. The runs of a sweep that read the same records share that
    of one of them, see `trainer.sweep.feed`, which gives the others another feed and leaves their streams unread.
    """

    settings: TrainSettings
    processes: Processes
    stores: RunStores
    document_weights: DocumentWeights | None
    held_out: RecordSubset  # of the first teacher's store
    student: PreTrainedModel
    model: torch.nn.Module  # the student with its loss, wrapped once more where there are several processes
    optimizer: Optimizers
    stream: RecordStream  # the feed's, once that has been asked for a step
    reader: StudentReader | None = None  # of a student with another tokenizer
    step: int = 0
    positions: int = 0
    skipped: SkippedSteps = field(default_factory=SkippedSteps)
    feed: StepFeed = field(init=False)

    def __post_init__(self) -> None:
        self.feed = Prefetcher(
            self.stream,
            split=self.settings.micro_batches.split,
            collate=self.collate,
            device=self.processes.device,
            ahead=self.settings.stream.prefetch_micro_batches,
        )

    @property
    def store(self) -> LogitStore:
        """Of the first teacher, which the student is evaluated against."""
        return self.stores.teachers[0]

    @property
    def identity(self) -> TeacherIdentity:
        """Of the first teacher, with the vocabulary that the student has."""
        return _describe_vocabulary(self.stores, self.reader)

    @property
    def output(self) -> Path:
        return Path(self.settings.output)

    @property
    def is_first_rank(self) -> bool:
        return self.processes.rank == 0

    def collate(self, batch: RecordBatch) -> TrainBatch:
        """A micro-batch as the student is taught it, on the CPU."""
        weights = None if self.document_weights is None else self.document_weights.compute(batch)
        if self.settings.support_slots is not None:
            batch = first_slots(batch, self.settings.support_slots)
        if self.reader is not None:
            return self.reader.collate(batch)
        return collate_signals(
            batch,
            self.settings.teacher_weights,
            position_weights=weights,
            is_packed=self.settings.pack_sequences,
        )

    def prepare(self, records: RecordBatch, parts: Sequence[RecordBatch] | None = None) -> PreparedStep:
        """What the feed makes of a rank's records of a step, here and now.

        Args:
            records: of the step.
            parts: the same in micro-batches; None cuts them as the settings say.
        """
        parts = self.settings.micro_batches.split(records) if parts is None else parts
        micro_batches = (self.collate(part).to(self.processes.device) for part in parts)
        return PreparedStep(records=records, parts=parts, micro_batches=micro_batches)

    def close(self) -> None:
        """Stop the stream, and let go of what exchanges weights and gradients, with it of a student that is cut.

        What outlives the process group takes gloo's threads with it when Python frees it, which now and then never
        ends: they want the interpreter lock that it waits for them under.
        """
        self.feed.close()
        is_cut = is_sharded(self.model)
        self.model = unwrap_student(self.model)
        if isinstance(self.model, TranslatedStudent):
            log_counts(self.model.counts, self.processes)
        if is_cut:
            self.model = torch.nn.Identity()
            del self.student, self.optimizer
            gc.collect()  # layers and what gathers their weights hold each other


def prepare_run(settings: TrainSettings, processes: Processes) -> Run:
    """Open the stores, build the student, and take both to where a checkpoint in the output folder left them."""
    check_batch_divides(settings, processes.world_size)
    checkpoint = agree_on_checkpoint(Path(settings.output) / "checkpoints", processes)
    header = None if checkpoint is None else read_header(checkpoint)

    stores = open_pinned_stores(settings, header, processes)
    run = _build_run(settings, stores, processes, is_mixture=header is not None and "mixture" in header.stream)
    if checkpoint is not None and header is not None:
        check_same_run(checkpoint, header.identity, build_identity(run))
        load_state(checkpoint, run.student, run.optimizer.members, processes)
        run.stream.load_state_dict(header.stream)
        run.step, run.positions = header.step, header.positions
        run.skipped = SkippedSteps(total=header.skipped_steps, in_a_row=header.skipped_in_a_row)
        _LOGGER.info("going on from %s", checkpoint)
    run.model.train()
    return run


def _build_run(settings: TrainSettings, stores: RunStores, processes: Processes, *, is_mixture: bool) -> Run:
    """A run at its first step."""
    if settings.other_tokenizer is None:  # which has a loss of its own
        check_loss_fits_stores(settings.loss, stores.every)
    if settings.support_slots is not None:
        check_slots_fit_stores(stores.every)
    store = stores.teachers[0]
    weights = settings.document_weights
    document_weights = None if weights is None else DocumentWeights(weights, store, *stores.corpora)
    sources, held_out = select_sources(settings, stores, is_mixture=is_mixture)
    reader = open_student_reader(settings, stores)
    with_documents = reader is not None or (document_weights is not None and document_weights.needs_documents)
    stream = open_stream(settings, sources, processes, with_documents=with_documents)
    student = _build_fitting_student(settings, stores, reader, processes.device)
    taught = _build_taught(settings, student, stores, reader)
    if settings.activation_checkpointing:
        enable_activation_checkpointing(student)
    model = spread_student(taught, student, settings.parallel, processes, settings.precision)
    return Run(
        settings=settings,
        processes=processes,
        stores=stores,
        document_weights=document_weights,
        held_out=held_out,
        student=student,
        model=model,
        optimizer=build_optimizer(student, settings.optimizer),
        stream=stream,
        reader=reader,
    )


def _build_taught(
    settings: TrainSettings, student: PreTrainedModel, stores: RunStores, reader: StudentReader | None
) -> TaughtStudent:
    vocab_size = _describe_vocabulary(stores, reader).vocab_size
    if settings.other_tokenizer is not None:
        return TranslatedStudent(
            student, settings.loss, settings.other_tokenizer, vocab_size=vocab_size, precision=settings.precision
        )
    return TaughtStudent(
        student,
        settings.loss,
        vocab_size=vocab_size,
        precision=settings.precision,
        is_fused=settings.fused_loss,
    )


def _describe_vocabulary(stores: RunStores, reader: StudentReader | None) -> TeacherIdentity:
    teacher = stores.teachers[0].plan.teacher
    return teacher if reader is None else reader.describe_as_teacher(teacher)


def _build_fitting_student(
    settings: TrainSettings, stores: RunStores, reader: StudentReader | None, device: torch.device
) -> PreTrainedModel:
    teacher = _describe_vocabulary(stores, reader)
    student = build_student(settings.student, teacher, seed=settings.seed, device=device)
    if reader is not None:
        reader.fit(student)
        return student
    for store in (stores.teachers[0], *stores.corpora):
        check_student_fits(student, store)
    if settings.pack_sequences:
        check_packing(student, vocab_size=teacher.vocab_size)
    return student


def evaluate_run(run: Run) -> Evaluation:
    """Evaluate the student as it is on the held-out records, which the ranks share."""
    micro_batches = run.settings.micro_batches
    if micro_batches.sequences is None and micro_batches.tokens is None:
        micro_batches = replace(micro_batches, sequences=_EVALUATION_SEQUENCES)
    with prepare_evaluation(run.model, run.student) as student:
        if run.reader is not None:
            return evaluate_translated(
                student,
                read_records(run.store, run.held_out, run.processes, with_documents=True),
                run.reader,
                micro_batches=micro_batches,
                precision=run.settings.precision,
                processes=run.processes,
            )
        return evaluate_records(
            student,
            run.store,
            run.held_out,
            micro_batches=micro_batches,
            precision=run.settings.precision,
            processes=run.processes,
        )


def save_run(run: Run) -> None:
    """Write a checkpoint; every rank has to come here, and returns when it is there."""
    urls = [corpus.store for corpus in run.settings.further_corpora]
    first, *further = list_manifests(run.stores.teachers)
    header = CheckpointHeader(
        step=run.step,
        positions=run.positions,
        manifest_number=first,
        further_manifests=further,
        corpus_manifests=dict(zip(urls, list_manifests(run.stores.corpora), strict=True)),
        stream=run.feed.state_dict(),
        identity=build_identity(run),
        skipped_steps=run.skipped.total,
        skipped_in_a_row=run.skipped.in_a_row,
    )
    save_checkpoint(
        run.output / "checkpoints",
        header,
        run.student,
        run.optimizer.members,
        run.processes,
        keep=run.settings.keep_checkpoints,
    )


def collect_student(run: Run) -> PreTrainedModel | None:
    """The whole student on rank 0, None on the others; every rank has to come here.

    One that is cut among processes is built once more, on the CPU, and given the gathered weights.
    """
    if not is_sharded(run.model):
        return run.student if run.is_first_rank else None
    state = gather_state(run.student, run.processes)
    if not run.is_first_rank:
        return None
    # Without the checks of its beginning: kernels for attention that it was tried out with may not run on a CPU.
    student = build_student(run.settings.student, run.identity, seed=run.settings.seed, device=torch.device("cpu"))
    student.load_state_dict(state)
    return student


def build_identity(run: Run) -> dict[str, Any]:
    """Name and value of everything that must stay the same for a run to go on from its checkpoint."""
    identity: dict[str, Any] = {"store": run.store.fingerprint}
    further = zip(run.stores.teachers[1:], run.settings.teacher_weights[1:], strict=True)
    for number, (store, weight) in enumerate(further):
        identity[f"further_teachers.{number}"] = {"store": store.fingerprint, "weight": weight}
    if run.document_weights is not None:
        identity["document_weights"] = run.document_weights.identity
    if run.reader is not None:
        identity["student_tokenizer"] = run.reader.tokenizer.fingerprint
    return {**identity, **describe_settings(run.settings)}


def describe_settings(settings: TrainSettings) -> dict[str, Any]:
    """Name and value of the settings that must stay the same for a run to go on; those of sections by their keys."""
    identity: dict[str, Any] = {}
    for name, value in settings.model_dump(mode="json", exclude=set(_FREE_SETTINGS)).items():
        if isinstance(value, dict):
            identity.update({f"{name}.{key}": part for key, part in value.items()})
        else:
            identity[name] = value
    if settings.order_seed == settings.seed:
        identity["order_seed"] = None  # as it is in runs that do not name it
    return identity
