"""A sweep from its file to its figures: finished runs are left alone, all others go on from their checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from logitstore.errors import TrainingError
from trainer.checkpoint import find_latest_checkpoint, read_header
from trainer.distributed import Processes, join_processes
from trainer.interrupt import listen_for_stop
from trainer.sweep.group import GroupTraining, OnStep
from trainer.sweep.plan import group_runs
from trainer.sweep.record import RunResult, SweepRecord
from trainer.sweep.results import MeanResult, compute_gaps, compute_means, write_csv
from trainer.sweep.settings import Sweep

_NOTHING_SAVED = {"status": "interrupted", "steps": 0, "positions": 0}


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """How a sweep ended, or was interrupted.

    Attributes:
        output: folder of the sweep, with `sweep.json` and `sweep.csv` in it.
        runs: every run, in the sweep's order.
        means: over seeds, of runs that differ in nothing else; none where no run has such a sibling.
        latest_manifests: of the stores whose latest manifest was asked for, the number of the one that was read.
        interrupted: whether somebody asked the sweep to stop; the same command goes on.
    """

    output: Path
    runs: Sequence[RunResult]
    means: Sequence[MeanResult]
    latest_manifests: dict[str, int]
    interrupted: bool

    @property
    def failed(self) -> list[RunResult]:
        """The runs that did not come to their end by themselves."""
        return [run for run in self.runs if run.status == "failed"]


def train_sweep(sweep: Sweep, *, on_step: OnStep | None = None) -> SweepReport:
    """Train every run of a sweep that is not finished yet; those that share a stream side by side.

    Every run ends as `trainer.loop.train` would end it alone, bit for bit, whatever runs stand beside it and however
    often the sweep is killed and started again. One that fails leaves the others alone.

    Args:
        sweep: as `read_sweep` gives it.
        on_step: called on every rank after every step of a run, with the run's name.

    Raises:
        ConfigError: what an earlier start wrote cannot be read.
        TrainingError: a finished run had other settings.
        StoreNotFoundError, CorruptShardError, OutsideError: a store cannot be read.
    """
    groups = group_runs(sweep.runs, sweep.runs_at_once)
    with ExitStack() as stack:
        stop_request = stack.enter_context(listen_for_stop())
        processes = stack.enter_context(join_processes(sweep.runs[0].settings.device))
        record = SweepRecord(sweep, groups, processes)
        for group in groups:
            left = [run for run in group if record.results[run.name].status != "finished"]
            with join_processes(group[0].settings.device) as of_group:
                training = GroupTraining(processes=of_group, stop_request=stop_request, record=record, on_step=on_step)
                if left and not training.should_stop():
                    training.train(left)
        report = finish_sweep(sweep, record, processes)
        processes.wait_for_all()
    return report


def finish_sweep(sweep: Sweep, record: SweepRecord, processes: Processes) -> SweepReport:
    """Put side by side what the runs of a sweep reached, and write it down on rank 0."""
    found = [_tell_what_is_saved(result) for result in record.results.values()]
    results = compute_gaps(found, {run.name: run.settings for run in sweep.runs})
    means = compute_means(results)
    record.finish(results, means)
    if processes.rank == 0:
        write_csv(results, sweep.output / "sweep.csv")
    return SweepReport(
        output=sweep.output,
        runs=results,
        means=means,
        latest_manifests=record.latest,
        interrupted=any(run.status in ("planned", "running", "interrupted") for run in results),
    )


def _tell_what_is_saved(result: RunResult) -> RunResult:
    """A run that the sweep did not come to, or whose process was lost and not begun again: where it will go on."""
    if result.status not in ("planned", "running"):
        return result
    latest = find_latest_checkpoint(Path(result.output) / "checkpoints")
    if latest is None:
        return result if result.status == "planned" else result.model_copy(update=_NOTHING_SAVED)
    try:
        header = read_header(latest)
    except TrainingError:  # the next start says what to do about it
        return result
    return result.model_copy(update={"status": "interrupted", "steps": header.step, "positions": header.positions})
