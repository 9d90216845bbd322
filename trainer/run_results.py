"""What is taken from a run that goes on: evaluations, checkpoints, the student as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from trainer.checkpoint import CheckpointHeader, save_checkpoint
from trainer.evaluate import Evaluation, evaluate_records
from trainer.parallel import gather_state, is_sharded, prepare_evaluation
from trainer.run import Run
from trainer.run_identity import build_identity
from trainer.sources import read_records
from trainer.stores import list_manifests
from trainer.student import build_student
from trainer.vocabularies.evaluation import evaluate_translated

# Sequences per forward pass of an evaluation where the run has no micro-batch of its own.
_EVALUATION_SEQUENCES = 8


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
        identity=build_identity(run.settings, run.stores, run.document_weights, run.reader),
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
    with run.processes.fail_together(run.output):
        return _rebuild_student(run, state) if run.is_first_rank else None


def _rebuild_student(run: Run, state: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    # Without the checks of its beginning: kernels for attention that it was tried out with may not run on a CPU.
    student = build_student(run.settings.student, run.identity, seed=run.settings.seed, device=torch.device("cpu"))
    student.load_state_dict(state)
    return student
