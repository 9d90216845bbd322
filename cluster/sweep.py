"""A sweep on a cluster: each group of runs that share a stream is a trial of Ray Tune.

What a sweep is, what its runs become and what it leaves behind is as in `trainer.sweep`; here groups are trained at the
same time, wherever there is room. The driver writes sweep.json, the table and nothing else; a group notes what it does
on the job's board, and is begun again from the checkpoints of its runs when its process is lost. All of them read
through the cache of their machine, where the sweep's settings name one.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from cluster.sweep_group import GroupTask, get_result_changes, train_group
from cluster.training_board import News
from cluster.training_watch import SharedFolder, start_board, watch_job
from cluster.worker_demand import WorkerDemand
from logitstore.errors import OutsideError
from trainer.distributed import Processes
from trainer.sweep.group import OnStep
from trainer.sweep.plan import plan_groups
from trainer.sweep.record import SweepRecord
from trainer.sweep.settings import Sweep, SweepRun
from trainer.sweep.training import SweepReport, finish_sweep


def run_sweep(
    sweep: Sweep, *, demand: WorkerDemand, workers: int | None = None, on_step: OnStep | None = None
) -> SweepReport:
    """Train every run of a sweep that is not finished yet, groups side by side. Call inside `connection.connect`.

    Every run ends as `trainer.loop.train` would end it alone, bit for bit, wherever it is trained and however often its
    process is lost.

    Args:
        sweep: as `read_sweep` gives it; its output folder is one that all machines share.
        demand: what the process of each group asks for.
        workers: at most so many groups at a time. Where there are fewer groups, they are divided; None takes them as
            they are, and as many as there is room for.
        on_step: called now and then with a run's name and newest step.

    Raises:
        ConfigError, TrainingError, StoreNotFoundError, CorruptShardError: as `trainer.sweep.training.train_sweep`.
        ConfigError: the machines do not share the output folder.
        OutsideError: Ray cannot go on.
    """
    groups = plan_groups(sweep.runs, sweep.runs_at_once, workers=workers)
    driver = Processes(rank=0, world_size=1, device=torch.device("cpu"))
    record = SweepRecord(sweep, groups, driver)
    name = f"logitstore-{uuid.uuid4().hex}"
    board = start_board(name)
    with SharedFolder(sweep.output) as shared, tempfile.TemporaryDirectory(prefix="logitstore-") as scratch:
        parts = _leave_tasks(board, groups, record, demand, shared)
        tuner = tune.Tuner(
            tune.with_resources(train_group, demand.amounts),
            param_space={"board": name, "part": tune.grid_search(parts)},
            tune_config=tune.TuneConfig(max_concurrent_trials=workers),
            # The board counts what is lost, and knows whether anything came of it.
            run_config=tune.RunConfig(
                storage_path=scratch, name="sweep", verbose=0, failure_config=tune.FailureConfig(max_failures=-1)
            ),
        )
        if parts:
            results = watch_job(tuner.fit, board, lambda news: _hear(news, record, on_step))
            _check_trials([] if results is None else results.errors)
    return finish_sweep(sweep, record, driver)


def _leave_tasks(
    board: Any,
    groups: Sequence[Sequence[SweepRun]],
    record: SweepRecord,
    demand: WorkerDemand,
    shared: SharedFolder,
) -> list[str]:
    """Leave a task for every group that is not finished; the names of these parts."""
    parts = []
    for number, group in enumerate(groups):
        runs = [
            SweepRun(name=run.name, labels=run.labels, settings=record.find_settings(run))
            for run in group
            if record.results[run.name].status != "finished"
        ]
        if runs:
            task = GroupTask(
                runs=runs,
                results={run.name: record.results[run.name] for run in runs},
                identities={run.settings.output: record.describe_run(run.settings) for run in runs},
                demand=demand,
                folder=Path.cwd(),
                shared=shared,
            )
            parts.append(f"group {number}")
            ray.get(board.leave.remote(parts[-1], task, [run.name for run in runs]))
    return parts


def _hear(news: News, record: SweepRecord, on_step: OnStep | None) -> None:
    for name, notes in news.notes.items():
        if changes := get_result_changes(notes):
            record.update(name, **changes)
        if on_step is not None and "step" in notes:
            on_step(name, notes["step"])


def _check_trials(errors: Sequence[Exception]) -> None:
    """Groups that fail are begun again by Ray; it gives one up only where it cannot start it."""
    if errors:
        raise OutsideError(
            f"Ray: expected to train every group of the sweep, found {errors[0]}; look at the cluster, then run the "
            "command again"
        )
