"""One run on a cluster: the loop of `trainer.loop` in the workers of Ray Train, begun again when one is lost.

The run's own checkpoints are all that survives, so its output folder has to be on a file system that all machines
share. Whatever happens to workers, machines or driver, what begins next goes on from the newest checkpoint: with as
many workers as before the student is the one of a run that nothing happened to, bit for bit.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from cluster.training_board import News, Welcome
from cluster.training_watch import (
    MovedError,
    Notes,
    SharedFolder,
    describe_loss,
    find_saved_steps,
    follow_orders,
    start_board,
    watch_job,
)
from cluster.worker_demand import WorkerDemand
from logitstore.errors import ConfigError, LogitStoreError, OutsideError
from trainer.checkpoint import find_latest_checkpoint, read_header
from trainer.config import TrainSettings, check_batch_divides
from trainer.distributed import Processes, join_processes
from trainer.interrupt import StopRequest
from trainer.loop import TrainReport, train
from trainer.progress import StepResult

_PART = "run"
# Ranks that all fail alike end without a restart, which would only find out that there is nothing to do.
_AGREE_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """What every worker of a run needs.

    Attributes:
        settings: of the run.
        folder: of the driver, from which relative paths begin.
        shared: by which a worker knows the output folder.
    """

    settings: TrainSettings
    folder: Path
    shared: SharedFolder


def run_train(
    settings: TrainSettings, *, demand: WorkerDemand, workers: int, on_step: Callable[[StepResult], None] | None = None
) -> TrainReport:
    """Train a student to the end of its settings with workers of Ray Train. Call inside `cluster.connection.connect`.

    SIGTERM, and Ray's notice that it will take a machine away, have the run saved at the step that it is at. In the
    first case it ends there, in the second it goes on elsewhere.

    Args:
        settings: of the run. Relative paths begin at this process's folder, which workers look for on their machines.
        demand: what every worker asks for.
        workers: how many processes share the run.
        on_step: called now and then with the newest step.

    Raises:
        ConfigError: as `trainer.loop.train`, or the machines do not share the output folder.
        OutsideError: the workers were lost again and again at the same step, or Ray cannot go on.
        LogitStoreError: as `trainer.loop.train`.
    """
    check_batch_divides(settings, workers)
    board = start_board()
    reports: list[TrainReport] = []

    def hear(news: News) -> None:
        notes = news.notes.get(_PART, {})
        if on_step is not None and "step" in notes:
            on_step(notes["step"])
        if "report" in notes:
            reports.append(notes["report"])

    with SharedFolder(Path(settings.output)) as shared, tempfile.TemporaryDirectory(prefix="logitstore-") as scratch:
        ray.get(board.leave.remote(_PART, TrainTask(settings=settings, folder=Path.cwd(), shared=shared), [_PART]))
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"board": board},
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=demand.gpus > 0, resources_per_worker=demand.amounts
            ),
            # The board counts what is lost, and knows whether anything came of it.
            run_config=RunConfig(storage_path=scratch, name=_PART, failure_config=FailureConfig(max_failures=-1)),
        )
        watch_job(trainer.fit, board, hear)
    return reports[-1] if reports else _describe_interrupted(settings)


def _describe_interrupted(settings: TrainSettings) -> TrainReport:
    """Of a run that was asked to stop while it had no workers."""
    latest = find_latest_checkpoint(Path(settings.output) / "checkpoints")
    header = None if latest is None else read_header(latest)
    steps, positions = (0, 0) if header is None else (header.step, header.positions)
    return TrainReport(steps=steps, positions=positions, interrupted=True, evaluation=None, student=None)


def train_worker(config: dict[str, Any]) -> None:
    """What each worker does; Ray Train has opened a process group.

    Raises:
        LogitStoreError: what another try may get past, and what not all workers fail with.
        MovedError: the run is saved, and is to go on elsewhere.
    """
    board = config["board"]
    task: TrainTask = ray.get(board.read_task.remote(_PART))
    if task.folder.is_dir():
        os.chdir(task.folder)
    try:
        with join_processes(task.settings.device) as processes:
            if _may_begin(board, task, processes):
                _train(board, task.settings, processes)
    except MovedError:
        raise
    except LogitStoreError as error:
        if error.exit_code != OutsideError.exit_code:
            _end_job(board, error)
            return
        board.report_trouble.remote(_PART, str(error))
        raise
    except Exception as error:
        board.report_trouble.remote(_PART, f"{type(error).__name__}: {error}")
        raise


def _may_begin(board: Any, task: TrainTask, processes: Processes) -> bool:
    """Whether the run goes on here, the same on every rank.

    Raises:
        ConfigError: a worker does not see the run's output folder.
        OutsideError: the workers were lost too often at one step.
    """
    problems: list[str] = []
    try:
        task.shared.check_is_seen()
    except ConfigError as error:
        problems.append(str(error))
    if problems := processes.join_texts(problems):
        raise ConfigError(problems[0])
    should_stop = False
    if processes.rank == 0:
        welcome: Welcome = ray.get(board.begin.remote(_PART, find_saved_steps(task.settings)))
        should_stop = welcome.order != "go on"
        if welcome.given_up is not None:
            lost = OutsideError(describe_loss(task.settings.output, welcome.given_up))
            ray.get(board.fail.remote(_PART, processes.rank, lost))
    if processes.take_from_first(int(should_stop)):
        return False
    ray.get(board.come.remote(_PART, ray.get_runtime_context().get_node_id()))
    return True


def _train(board: Any, settings: TrainSettings, processes: Processes) -> None:
    request, notes = StopRequest(), Notes(board)

    def take_note(result: StepResult) -> None:
        if processes.rank == 0:
            notes.note_now_and_then(_PART, lambda: {"step": result})

    with follow_orders(board, _PART, request):
        report = train(settings, on_step=take_note, stop_request=request)
    is_moving = report.interrupted and ray.get(board.read_order.remote(_PART)) == "move"
    if processes.take_from_first(int(is_moving)):
        raise MovedError
    if processes.rank == 0:
        notes.note(_PART, {"report": report})


def _end_job(board: Any, error: LogitStoreError) -> None:
    """End the job with an error; raises it where other ranks have none, and have to be ended."""
    context = ray.train.get_context()
    failed = ray.get(board.fail.remote(_PART, context.get_world_rank(), error))
    deadline = time.monotonic() + _AGREE_SECONDS
    while failed < context.get_world_size():
        if time.monotonic() > deadline:
            raise error
        time.sleep(0.1)
        failed = ray.get(board.count_failed.remote(_PART))
