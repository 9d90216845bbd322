"""`logitstore sweep`: many students from one store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.logs import AsJson, Quiet, Verbose, set_up_logs
from tools.places import Address, Cpus, Gpus, Place, choose_place

if TYPE_CHECKING:
    from trainer.sweep.settings import Sweep
    from trainer.sweep.training import SweepReport


def command(
    settings_file: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="What runs have in common, and not.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace the file's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs, and which of them share a stream; train none.")
    ] = False,
    address: Address = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on the cluster at a time; runs that share a stream are divided for them."),
    ] = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train many students from one store, and compare them.

    Runs that read the same records in the same order share the reading: they are trained side by side. Run again, a
    sweep leaves finished runs alone and goes on with the others. Ends with exit code 3 when a run has failed, and with
    4 when the sweep was asked to stop (SIGTERM) before it was done.

    On a Ray cluster, runs that share a stream are one process, which is begun again from their checkpoints when it is
    lost; the output folder is one that all machines share.

    \b
    Example:
      logitstore sweep sweep.yaml --dry-run
      logitstore sweep sweep.yaml steps=5000
      torchrun --nproc-per-node 8 -m tools.sweep sweep.yaml
      logitstore sweep sweep.yaml --address auto --workers 8
    """
    set_up_logs(quiet=quiet, verbose=verbose)
    from trainer.sweep.settings import read_sweep

    sweep = read_sweep(settings_file, overrides or [])
    is_first_rank = os.environ.get("RANK", "0") == "0"
    place = choose_place(address, workers, cpus, gpus)
    if dry_run:
        if is_first_rank:
            _print_plan(sweep, workers, as_json=as_json)
        return
    report = run_sweep(sweep, quiet=quiet or not is_first_rank, place=place)
    if is_first_rank:
        _print_report(report, as_json=as_json)
        check_report(report)
    elif report.interrupted or report.failed:
        raise typer.Exit(4 if report.interrupted else 3)


def check_report(report: SweepReport) -> None:
    """Hold a sweep to what was asked for.

    Raises:
        OutsideError: it was asked to stop before it was done.
        TrainingError: runs have failed.
    """
    from logitstore.errors import OutsideError, TrainingError

    if report.interrupted:
        raise OutsideError(
            f"{report.output}: expected all runs to be trained, found that the sweep was asked to stop before; run the "
            "same command again to go on"
        )
    if report.failed:
        names = ", ".join(run.name for run in report.runs if run.status == "failed")
        raise TrainingError(
            f"{report.output}: expected every run to be trained, found runs that failed: {names}; look at their errors "
            "above, then run the same command again"
        )


def run_sweep(sweep: Sweep, *, quiet: bool = False, place: Place | None = None) -> SweepReport:
    """Train with a progress bar on stderr; see `trainer.sweep.training`, and `cluster.sweep` for a cluster."""
    from tools.look import show_progress
    from trainer.progress import StepResult

    all_steps = sum(run.settings.steps for run in sweep.runs)
    done: dict[str, int] = {}
    with show_progress("sweep", quiet=quiet) as report:

        def show(name: str, result: StepResult) -> None:
            done[name] = result.step
            report(sum(done.values()), all_steps, f"{name}  loss {result.loss:.3f}  KL {result.bucket_kl:.3f}")

        if place is None:
            from trainer.sweep.training import train_sweep

            return train_sweep(sweep, on_step=show)
        with place.join() as demand:
            from cluster.sweep import run_sweep

            return run_sweep(sweep, demand=demand, workers=place.workers, on_step=show)


def _print_plan(sweep: Sweep, workers: int | None, *, as_json: bool) -> None:
    from tools.look import build_facts, count_things, print_json, print_result
    from tools.sweep_table import build_plan_table
    from trainer.sweep.plan import plan_groups

    groups = plan_groups(sweep.runs, sweep.runs_at_once, workers=workers)
    if as_json:
        streams = [
            [
                {"name": run.name, "labels": run.labels, "output": run.settings.output, "steps": run.settings.steps}
                for run in group
            ]
            for group in groups
        ]
        print_json({"output": str(sweep.output), "streams": streams})
        return
    facts = [
        ("output", sweep.output),
        ("runs", f"{count_things(len(sweep.runs), 'run')}, {count_things(len(groups), 'stream')}"),
    ]
    print_result(build_facts(facts), build_plan_table(groups))


def _print_report(report: SweepReport, *, as_json: bool) -> None:
    from tools.look import build_facts, print_json, print_result
    from tools.sweep_plot import write_plot
    from tools.sweep_table import build_means_table, build_runs_table, list_errors

    plot = write_plot(report, report.output / "sweep.svg")
    if as_json:
        print_json(
            {
                "output": str(report.output),
                "interrupted": report.interrupted,
                "manifests": report.latest_manifests,
                "runs": [run.model_dump(mode="json", exclude={"identity"}) for run in report.runs],
                "means": [mean.model_dump(mode="json") for mean in report.means],
                "plot": None if plot is None else str(plot),
            }
        )
        return
    manifests = ", ".join(f"{number} of {url}" for url, number in report.latest_manifests.items())
    facts = [
        ("output", report.output),
        ("manifest", manifests or None),
        ("table", report.output / "sweep.csv"),
        ("plot", plot),
        ("next", "run the same command again to go on" if report.interrupted else None),
    ]
    means = [build_means_table(report.means)] if report.means else []
    print_result(build_runs_table(report.runs), *means, *list_errors(report.runs), build_facts(facts))


if __name__ == "__main__":
    from tools.cli import main

    main("sweep")
