"""A run: what lives as long as a call of `train`, prepared from settings or a checkpoint."""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
)
from trainer.config import TrainSettings, check_batch_divides
from trainer.distributed import Processes
from trainer.divergence import SkippedSteps
from trainer.document_weights import DocumentWeights
from trainer.optimizer import Optimizers, build_optimizer
from trainer.packing import check_packing
from trainer.parallel import (
    enable_activation_checkpointing,
    is_sharded,
    spread_student,
    unwrap_student,
)
from trainer.prefetch import Prefetcher, PreparedStep, StepFeed
from trainer.run_identity import build_identity
from trainer.sources import open_stream, select_sources
from trainer.stores import (
    RunStores,
    check_loss_fits_stores,
    check_slots_fit_stores,
    open_pinned_stores,
)
from trainer.student import build_student, check_student_fits
from trainer.taught_student import TaughtStudent
from trainer.teachers import collate_signals
from trainer.vocabularies.student_reader import StudentReader, log_counts, open_student_reader
from trainer.vocabularies.taught_student import TranslatedStudent

_LOGGER = logging.getLogger(__name__)


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
    optimizer: Optimizers = field(init=False)  # of the student as it is among the processes
    stream: RecordStream  # the feed's, once that has been asked for a step
    reader: StudentReader | None = None  # of a student with another tokenizer
    step: int = 0
    positions: int = 0
    skipped: SkippedSteps = field(default_factory=SkippedSteps)
    is_closed: bool = False
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
        if self.is_closed:
            return
        self.is_closed = True
        self.feed.close()
        is_cut = is_sharded(self.model)
        self.model = unwrap_student(self.model)
        if isinstance(self.model, TranslatedStudent):
            log_counts(self.model.counts, self.processes)
        if is_cut:
            self.let_go()

    def let_go(self) -> None:
        """Close the run, and let go of student and optimizer, for whose memory others may be waiting."""
        self.close()
        self.model = torch.nn.Identity()
        for name in ("student", "optimizer"):
            self.__dict__.pop(name, None)
        gc.collect()  # layers and what gathers their weights hold each other


def prepare_run(settings: TrainSettings, processes: Processes) -> Run:
    """Open the stores, build the student, and take both to where a checkpoint in the output folder left them.

    Every rank has to come here, and fails where one does.
    """
    check_batch_divides(settings, processes.world_size)
    checkpoint = agree_on_checkpoint(Path(settings.output) / "checkpoints", processes)
    with processes.fail_together(settings.output):
        header = None if checkpoint is None else read_header(checkpoint)
    stores = open_pinned_stores(settings, header, processes)
    run = _build_run(settings, stores, processes, is_mixture=header is not None and "mixture" in header.stream)
    try:
        with processes.fail_together(settings.output):
            run.optimizer = build_optimizer(run.student, settings.optimizer)
        if checkpoint is not None and header is not None:
            _go_on(run, checkpoint, header)
    except Exception as error:
        _clear_frames(error)
        run.let_go()
        raise
    run.model.train()
    return run


def _go_on(run: Run, checkpoint: Path, header: CheckpointHeader) -> None:
    """Take a run to where a checkpoint was."""
    with run.processes.fail_together(checkpoint):
        identity = build_identity(run.settings, run.stores, run.document_weights, run.reader)
        check_same_run(checkpoint, header.identity, identity)
    load_state(checkpoint, run.student, run.optimizer.members, run.processes)
    with run.processes.fail_together(checkpoint):
        run.stream.load_state_dict(header.stream)
    run.step, run.positions = header.step, header.positions
    run.skipped = SkippedSteps(total=header.skipped_steps, in_a_row=header.skipped_in_a_row)
    _LOGGER.info("going on from %s", checkpoint)


def _clear_frames(error: BaseException) -> None:
    """Let go of what functions that failed were at work on, which an error keeps for as long as it is on its way."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__


def _build_run(settings: TrainSettings, stores: RunStores, processes: Processes, *, is_mixture: bool) -> Run:
    """A run at its first step, without an optimizer."""
    with processes.fail_together(settings.output):
        document_weights = _open_document_weights(settings, stores)
        sources, held_out = select_sources(settings, stores, is_mixture=is_mixture)
        reader = open_student_reader(settings, stores)
        with_documents = reader is not None or (document_weights is not None and document_weights.needs_documents)
        student = _build_fitting_student(settings, stores, reader, processes.device)
        taught = _build_taught(settings, student, stores, reader)
        if settings.activation_checkpointing:
            enable_activation_checkpointing(student)
        stream = open_stream(settings, sources, processes, with_documents=with_documents)
    return Run(
        settings=settings,
        processes=processes,
        stores=stores,
        document_weights=document_weights,
        held_out=held_out,
        student=student,
        model=spread_student(taught, student, settings.parallel, processes, settings.precision),
        stream=stream,
        reader=reader,
    )


def _open_document_weights(settings: TrainSettings, stores: RunStores) -> DocumentWeights | None:
    """The weights of documents, if there are any, after a look at whether the stores suit the loss."""
    if settings.other_tokenizer is None:  # which has a loss of its own
        check_loss_fits_stores(settings.loss, stores.every)
    if settings.support_slots is not None:
        check_slots_fit_stores(stores.every, settings.support_slots)
    weights = settings.document_weights
    return None if weights is None else DocumentWeights(weights, stores.teachers[0], *stores.corpora)


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
