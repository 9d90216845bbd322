"""How well a student does on records: against the text, and against what the teacher said."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from logitstore.errors import TrainingError
from logitstore.records import RecordBatch
from logitstore.store.logit_store import LogitStore
from logitstore.stream.selection import select_records
from logitstore.stream.subset import RecordSubset
from trainer.batch import TrainBatch
from trainer.config import EvaluateSettings, Precision, StudentSettings
from trainer.data import collate
from trainer.distributed import Processes, join_processes
from trainer.evaluation import EntropyFigures, Evaluation, Figures, GroupFigures
from trainer.evaluation_sums import (
    CALIBRATION_BINS,
    NUM_SUMS,
    add_up,
    build_evaluation,
    compute_evaluation_sums,
    compute_position_figures,
)
from trainer.micro_batches import MicroBatches
from trainer.pretrained import check_is_there
from trainer.record_groups import RecordGroups
from trainer.sources import read_records
from trainer.stores import open_at_one_manifest
from trainer.student import build_student, check_student_fits

__all__ = [
    "CALIBRATION_BINS",
    "EntropyFigures",
    "Evaluation",
    "Figures",
    "GroupFigures",
    "build_evaluation",
    "compute_evaluation_sums",
    "compute_logits",
    "evaluate",
    "evaluate_records",
    "evaluate_student",
    "evaluate_students",
    "pin_manifest",
]


def evaluate_student(settings: EvaluateSettings) -> Evaluation:
    """Evaluate a student's folder on a store; see `evaluate_students`."""
    [evaluation] = evaluate_students(settings, [settings.student])
    return evaluation


def evaluate_students(settings: EvaluateSettings, students: Sequence[str]) -> Iterator[Evaluation]:
    """Evaluate one student after the other on the same records, with every process of this run.

    Args:
        settings: of the evaluation, whose `student` is not looked at.
        students: folders, or names on the hub.

    Yields:
        The evaluation of each, when it is done; the same on every rank.

    Raises:
        ConfigError: a student cannot be loaded, no record meets the conditions, or the records hold no taught
            position.
        IncompatibleStoreError: a student reads fewer ids, or fewer positions, than the store's records have.
        TrainingError: a student's logits are not finite.
        CorruptShardError, OutsideError: the store cannot be read.
    """
    # A student with another tokenizer is evaluated there, with the parts of this.
    from trainer.vocabularies.evaluation import evaluate_folder
    from trainer.vocabularies.student_reader import find_student_reader

    for folder in students:  # before hours go by with those that come first
        check_is_there(folder, "student")
    with join_processes(settings.device) as processes:
        store = open_at_one_manifest(settings.store, settings.manifest, settings.storage_options, processes)
        train, held_out = select_records(store, settings.where, settings.held_out)
        records = train if settings.held_out is None else held_out
        for folder in students:
            if (reader := find_student_reader(folder, store)) is not None:
                yield evaluate_folder(reader, folder, settings, store, records, processes)
                continue
            student = build_student(StudentSettings(model=folder), store.plan.teacher, seed=0, device=processes.device)
            check_student_fits(student, store)
            yield evaluate_records(
                student,
                store,
                records,
                micro_batches=settings.micro_batches,
                precision=settings.precision,
                processes=processes,
            )


def pin_manifest(settings: EvaluateSettings, processes: Processes) -> EvaluateSettings:
    """The same settings with the number that `latest` is on rank 0 now: a store may grow while it is evaluated on.

    Every rank has to come here.
    """
    store = open_at_one_manifest(settings.store, settings.manifest, settings.storage_options, processes)
    return settings.model_copy(update={"manifest": store.manifest_number})


def evaluate_records(
    student: torch.nn.Module,
    store: LogitStore,
    records: RecordSubset,
    *,
    micro_batches: MicroBatches,
    precision: Precision,
    processes: Processes,
) -> Evaluation:
    """Evaluate a student on records of a store, which the ranks share; see `evaluate`."""
    groups = RecordGroups(store)
    return evaluate(
        student,
        read_records(store, records, processes, with_documents=groups.has_labels),
        vocab_size=store.plan.teacher.vocab_size,
        micro_batches=micro_batches,
        precision=precision,
        processes=processes,
        is_likeliest_kept=store.plan.is_likeliest_kept,
        groups=groups,
    )


def evaluate(
    student: torch.nn.Module,
    batches: Iterable[RecordBatch],
    *,
    vocab_size: int,
    micro_batches: MicroBatches,
    precision: Precision,
    processes: Processes,
    is_likeliest_kept: bool = True,
    groups: RecordGroups | None = None,
) -> Evaluation:
    """Evaluate a student on records; it is left in the mode (training or not) it came in.

    Sums are taken in float64 over positions, and added up over micro-batches and ranks before anything is divided: how
    the records are spread over them changes no more than the rounding of the student's own logits.

    Args:
        student: a transformers causal LM on the device of `processes`.
        batches: this rank's share of the records. Every rank has to come here.
        vocab_size: ids that the teacher's distribution is over.
        micro_batches: what goes through the student at once.
        precision: `bfloat16` runs the student under autocast.
        processes: whose shares are added up.
        is_likeliest_kept: whether the first of a kept support is the teacher's likeliest token.
        groups: of the store that the records are of, with nothing added yet; None tells no sources and labels apart.

    Raises:
        ConfigError: the records of all ranks together hold no taught position.
        TrainingError: the student's logits are not finite.
    """
    sums = np.zeros(NUM_SUMS)
    parts = (part for batch in batches for part in micro_batches.split(batch))
    with evaluation_mode(student):
        for part in keep_in_step(student, parts, processes):
            if part is None:
                run_for_others(student, processes.device, precision)
                continue
            inputs = collate(part, is_packed=micro_batches.is_packed).to(processes.device)
            logits = compute_logits(student, inputs, precision)[..., :vocab_size]
            figures = compute_position_figures(logits, inputs)
            sums += add_up(figures).cpu().numpy()
            if groups is not None:
                groups.add(part, figures.values)
    return _finish(sums, groups, processes, is_likeliest_kept=is_likeliest_kept)


def _finish(
    sums: np.ndarray, groups: RecordGroups | None, processes: Processes, *, is_likeliest_kept: bool
) -> Evaluation:
    """The evaluation over all ranks."""
    totals = np.array(processes.sum_over_ranks(sums.tolist()))
    sources, labels = ({}, {}) if groups is None else groups.join(processes)
    evaluation = build_evaluation(totals, sources=sources, labels=labels, is_likeliest_kept=is_likeliest_kept)
    if not math.isfinite(evaluation.lm_loss):
        raise TrainingError(
            f"evaluation: expected a finite loss of the student on the text, found {evaluation.lm_loss} over "
            f"{evaluation.positions:,} positions; look for NaN in its weights, or evaluate an earlier checkpoint"
        )
    return evaluation


def compute_logits(student: torch.nn.Module, batch: TrainBatch, precision: Precision) -> torch.Tensor:
    """[B, T, V'] logits of a student, bfloat16 where it runs under autocast."""
    with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        output = student(**batch.model_inputs)
    logits: torch.Tensor = output.logits
    return logits


def _is_sharded(student: torch.nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in student.modules())


def keep_in_step(
    student: torch.nn.Module, parts: Iterator[RecordBatch], processes: Processes
) -> Iterator[RecordBatch | None]:
    """Equally many parts on every rank, if need be: None where this one has no more of its own while another has.

    A student whose weights are spread over the ranks gathers them in every forward pass, so all have to make it.
    """
    if not _is_sharded(student):
        yield from parts
        return
    while True:
        part = next(parts, None)
        if not processes.sum_over_ranks([part is not None])[0]:
            return
        yield part


def run_for_others(student: torch.nn.Module, device: torch.device, precision: Precision) -> None:
    """A forward pass over one token that nobody looks at."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        student(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)


@contextmanager
def evaluation_mode(student: torch.nn.Module) -> Iterator[None]:
    """No dropout and no gradients while the block runs."""
    was_training = student.training
    student.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        student.train(was_training)
