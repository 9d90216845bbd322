"""The training loop: one student, one store, one process or many.

`train` reads from top to bottom; what a step does is in `take_step`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from trainer.config import TrainSettings
from trainer.distributed import join_processes
from trainer.divergence import check_finite
from trainer.evaluate import Evaluation
from trainer.interrupt import StopRequest, listen_for_stop
from trainer.loss.objective import DistillationLoss
from trainer.model_card import build_model_card
from trainer.optimizer import compute_distillation_weight, compute_learning_rate_scale, set_learning_rate
from trainer.parallel import clip_gradient, count_passes, synchronize_gradients
from trainer.prefetch import PreparedStep
from trainer.progress import StepResult
from trainer.run import Run, prepare_run
from trainer.run_logs import RunLogs
from trainer.run_results import collect_student, evaluate_run, save_run
from trainer.student import save_student

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """How a run ended.

    Attributes:
        steps: optimizer steps done, those before a resume and those that were skipped included.
        positions: positions trained on, likewise.
        interrupted: whether the run was asked to stop; the same command goes on from its checkpoint.
        evaluation: of the finished student on the held-out records; None without such, or when interrupted.
        student: folder of the finished student; None when interrupted.
        skipped_steps: steps that were skipped because loss or gradient were not finite.
    """

    steps: int
    positions: int
    interrupted: bool
    evaluation: Evaluation | None
    student: Path | None
    skipped_steps: int = 0


def train(
    settings: TrainSettings,
    *,
    on_step: Callable[[StepResult], None] | None = None,
    stop_request: StopRequest | None = None,
) -> TrainReport:
    """Train a student to the end of its settings, or until somebody asks it to stop (SIGTERM).

    Finds a checkpoint of the same run in the output folder and goes on from it: bit for bit as if it had never
    stopped, with as many processes as before; with another number of them over the same global batches.

    Args:
        settings: of the run.
        on_step: called on every rank after every step.
        stop_request: through which somebody else than SIGTERM may ask; given outside the main thread, which alone
            hears signals.

    Raises:
        ConfigError: settings and the number of processes, or the store, do not go together.
        IncompatibleStoreError: student and store disagree on vocabulary or tokenizer.
        TrainingError: the checkpoint belongs to another run, or loss or gradient are not finite too often.
        CorruptShardError, OutsideError: the store cannot be read.
    """
    with ExitStack() as stack:
        stop_request = stop_request or stack.enter_context(listen_for_stop())
        processes = stack.enter_context(join_processes(settings.device))
        run = prepare_run(settings, processes)
        stack.callback(run.close)
        logs = stack.enter_context(RunLogs(run))

        first_step, should_stop = run.step, False
        while run.step < settings.steps and not should_stop:
            prepared = next(run.feed)
            result = take_step(run, prepared)
            logs.write_step(result, prepared.records)
            if on_step is not None:
                on_step(result)
            should_stop = processes.sum_over_ranks([stop_request.is_made])[0] > 0  # all ranks stop at the same step
            if should_stop:  # at once: whoever asked may not wait for an evaluation
                save_run(run)
            if is_due(run, settings.evaluate_every) and run.step < settings.steps:
                logs.write_evaluation(evaluate_run(run))
            if is_checkpoint_due(run) and not should_stop:
                save_run(run)

        if run.document_weights is not None and run.step > first_step:
            run.document_weights.report_unmet(processes, first_step + 1, run.step)
        return finish_run(run, logs)


def take_step(run: Run, prepared: PreparedStep) -> StepResult:
    """One optimizer step on this rank's part of the global batch.

    The gradient is that of the mean over all taught positions of the global batch, however they are spread over ranks
    and micro-batches, of which ranks may have different numbers. Where loss or gradient are not finite, the student
    stays as it is.

    Raises:
        TrainingError: loss or gradient are not finite, in more steps in a row than may be skipped.
    """
    settings, processes = run.settings, run.processes
    seed_random(settings.seed, run.step, processes.rank)
    weight = compute_distillation_weight(run.step, settings.steps, settings.loss, settings.schedule)
    records = prepared.records
    positions, taught = processes.sum_over_ranks([records.num_positions, int(records.loss_mask.sum())])

    # Both DDP and FSDP take the mean of the ranks' gradients; the scale makes it their sum over all taught positions.
    losses = accumulate_gradient(run, prepared, weight, scale=processes.world_size / max(taught, 1.0))
    loss_sum, kl_sum, ce_sum = processes.sum_over_ranks(
        [
            sum(loss.total.item() for loss in losses),
            sum(loss.bucket_kl.item() for loss in losses),
            sum(loss.cross_entropy.item() for loss in losses),
        ]
    )
    gradient_norm = clip_gradient(run.student.parameters(), settings.optimizer.gradient_clip)
    is_finite = check_finite(
        run.step,
        prepared.parts,
        losses,
        loss_sum + kl_sum + ce_sum,
        gradient_norm,
        skipped=run.skipped,
        max_skipped=settings.max_skipped_steps,
        processes=processes,
    )
    learning_rate = update_student(run, positions=int(positions), is_finite=is_finite)
    if run.document_weights is not None:
        run.document_weights.note_met(records)
    return StepResult(
        step=run.step,
        loss=loss_sum / max(taught, 1.0),
        bucket_kl=kl_sum / max(taught, 1.0),
        cross_entropy=ce_sum / max(taught, 1.0),
        distillation_weight=weight,
        learning_rate=learning_rate,
        gradient_norm=gradient_norm,
        positions=int(positions),
        taught_positions=int(taught),
        is_skipped=not is_finite,
        skipped_steps=run.skipped.total,
    )


def update_student(run: Run, *, positions: int, is_finite: bool) -> float:
    """End a step: move the weights, unless the gradient is to be dropped; the learning rate of the step."""
    settings = run.settings
    learning_rate = settings.optimizer.learning_rate * compute_learning_rate_scale(
        run.step, settings.steps, settings.schedule
    )
    if is_finite:
        set_learning_rate(run.optimizer, learning_rate)
        run.optimizer.step()
        run.positions += positions
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return learning_rate


def accumulate_gradient(
    run: Run, prepared: PreparedStep, distillation_weight: float, *, scale: float
) -> list[DistillationLoss]:
    """Forward and backward over micro-batches; each adds the gradient of its loss sum times `scale`."""
    losses = []
    num_passes = count_passes(run.model, len(prepared.parts), run.processes)
    for number, micro_batch in enumerate(prepared.micro_batches, start=1):
        with synchronize_gradients(run.model, is_last=number == num_passes):
            loss: DistillationLoss = run.model(micro_batch, distillation_weight)
            (loss.total * scale).backward()
        losses.append(loss)
    for number in range(len(losses) + 1, num_passes + 1):  # other ranks have more to do, and need this one's weights
        with synchronize_gradients(run.model, is_last=number == num_passes):
            (run.model(micro_batch, distillation_weight).total * 0.0).backward()
    return losses


def finish_run(run: Run, logs: RunLogs) -> TrainReport:
    """Evaluate and save a student that has made all its steps; report what there is where the run was interrupted."""
    steps = run.settings.steps
    if run.step < steps:
        _LOGGER.warning("asked to stop: %d of %d steps done, saved in %s", run.step, steps, run.output)
        return _report(run, evaluation=None, student=None)
    evaluation = None
    if len(run.held_out):
        evaluation = evaluate_run(run)
        logs.write_evaluation(evaluation)
    folder = run.output / "student"
    student = collect_student(run)
    with run.processes.fail_together(folder):
        if student is not None:
            card = build_model_card(
                run.settings,
                run.stores,
                steps=run.step,
                positions=run.positions,
                evaluation=evaluation,
                skipped_steps=run.skipped.total,
            )
            save_student(student, folder, run.identity, run.settings.student, card=card)
    return _report(run, evaluation=evaluation, student=folder)


def _report(run: Run, *, evaluation: Evaluation | None, student: Path | None) -> TrainReport:
    return TrainReport(
        steps=run.step,
        positions=run.positions,
        interrupted=student is None,
        evaluation=evaluation,
        student=student,
        skipped_steps=run.skipped.total,
    )


def seed_random(seed: int, step: int, rank: int) -> None:
    """Seed every generator that a model may draw from (dropout), for one step of one rank."""
    drawn = np.random.SeedSequence([seed, step, rank]).generate_state(2)
    torch.manual_seed(int(drawn[0]))
    np.random.seed(int(drawn[1]))
    random.seed(int(drawn[1]))


def is_due(run: Run, every: int | None) -> bool:
    """Whether something that happens every so many steps, and after the last one, happens now."""
    return every is not None and (run.step % every == 0 or run.step == run.settings.steps)


def is_checkpoint_due(run: Run) -> bool:
    """Whether the run is saved after this step; after the last it is, so that its end can be done again."""
    return is_due(run, run.settings.checkpoint_every) or run.step == run.settings.steps
