"""A group of runs of a sweep in a process of its own: trained as on one machine, noted on the board of the job."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from cluster.training_board import Welcome
from cluster.training_watch import MovedError, Notes, SharedFolder, describe_loss, find_saved_steps, follow_orders
from cluster.worker_demand import WorkerDemand
from logitstore.errors import LogitStoreError, OutsideError
from trainer.config import TrainSettings
from trainer.distributed import join_processes
from trainer.interrupt import StopRequest
from trainer.progress import StepResult
from trainer.sweep.group import GroupTraining
from trainer.sweep.record import RunResult
from trainer.sweep.settings import SweepRun


@dataclass(frozen=True, kw_only=True)
class GroupTask:
    """What the process of a group needs.

    Attributes:
        runs: with the numbers of their manifests in their settings.
        results: of the runs, as far as earlier starts of the sweep came.
        identities: what makes each run the one it is, by its output folder.
        demand: what the process has asked for, which the runs are said to have had.
        folder: of the driver, from which relative paths begin.
        shared: by which the process knows the sweep's output folder.
    """

    runs: Sequence[SweepRun]
    results: Mapping[str, RunResult]
    identities: Mapping[str, dict[str, Any]]
    demand: WorkerDemand
    folder: Path
    shared: SharedFolder


class GroupRecord:
    """What `SweepRecord` is to a sweep on one machine: here, what a group does is noted on the board."""

    def __init__(self, task: GroupTask, welcome: Welcome, notes: Notes) -> None:
        self._task, self._notes = task, notes
        self.results = {
            name: result.model_copy(update=get_result_changes(welcome.notes.get(name, {})))
            for name, result in task.results.items()
        }

    def find_settings(self, run: SweepRun) -> TrainSettings:
        """Settings of a run with the numbers of its manifests."""
        return run.settings

    def describe_run(self, settings: TrainSettings) -> dict[str, Any]:
        """What makes a run the one it is."""
        return self._task.identities[settings.output]

    def update(self, name: str, **changes: Any) -> None:
        """Change what is known of a run, and return when the board knows it."""
        changes |= {"cpus": self._task.demand.cpus, "gpus": self._task.demand.gpus}
        self.results[name] = self.results[name].model_copy(update=changes)
        self._notes.note(name, changes)


def get_result_changes(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a run's notes that are about its result, and not about its progress."""
    return {name: value for name, value in notes.items() if name in RunResult.model_fields}


def train_group(config: dict[str, Any]) -> None:
    """What the trial of a group does.

    Raises:
        LogitStoreError: what another try may get past.
        MovedError: the runs are saved, and are to go on elsewhere.
    """
    board: Any = ray.get_actor(config["board"])
    part: str = config["part"]
    task: GroupTask = ray.get(board.read_task.remote(part))
    if task.folder.is_dir():
        os.chdir(task.folder)
    try:
        task.shared.check_is_seen()
        _train(board, part, task)
    except MovedError:
        raise
    except LogitStoreError as error:
        if error.exit_code != OutsideError.exit_code:
            ray.get(board.fail.remote(part, 0, error))
            return
        board.report_trouble.remote(part, str(error))
        raise
    except Exception as error:
        board.report_trouble.remote(part, f"{type(error).__name__}: {error}")
        raise


def _train(board: Any, part: str, task: GroupTask) -> None:
    saved = sum(find_saved_steps(run.settings) for run in task.runs)
    welcome: Welcome = ray.get(board.begin.remote(part, saved))
    notes = Notes(board)
    record = GroupRecord(task, welcome, notes)
    left = [run for run in task.runs if record.results[run.name].status not in ("finished", "failed")]
    if welcome.given_up is not None:
        for run in left:
            record.update(run.name, status="failed", error=describe_loss(f"run {run.name}", welcome.given_up))
    if welcome.order != "go on" or not left:
        return
    ray.get(board.come.remote(part, ray.get_runtime_context().get_node_id()))
    request = StopRequest()

    def take_note(name: str, result: StepResult) -> None:
        notes.note_now_and_then(name, lambda: {"step": result})

    with follow_orders(board, part, request), join_processes(left[0].settings.device) as processes:
        GroupTraining(processes=processes, stop_request=request, record=record, on_step=take_note).train(left)
    if request.is_made and ray.get(board.read_order.remote(part)) == "move":
        raise MovedError
