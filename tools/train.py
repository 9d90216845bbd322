"""`logitstore train`: train a student from a store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.logs import AsJson, Quiet, Verbose, set_up_logs
from tools.places import Address, Cpus, Gpus, Place, choose_place

if TYPE_CHECKING:
    from trainer.config import TrainSettings
    from trainer.loop import TrainReport


def command(
    settings_file: Annotated[Path, typer.Argument(metavar="TRAIN.yaml", help="Settings of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace the file's.")
    ] = None,
    address: Address = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes on the cluster that share the run; 1 unless given.")
    ] = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a student from a store.

    Run again, it goes on from its newest checkpoint. Ends with exit code 4 when it was asked to stop (SIGTERM) before
    it was done. On a Ray cluster the output folder is one that all machines share; workers that are lost begin again
    from its newest checkpoint.

    \b
    Example:
      logitstore train train.yaml
      logitstore train train.yaml loss.weight=0.9 steps=5000
      torchrun --nproc-per-node 8 -m tools.train train.yaml
      logitstore train train.yaml --address auto --workers 16
    """
    set_up_logs(quiet=quiet, verbose=verbose)
    from logitstore.errors import OutsideError
    from logitstore.settings import read_settings
    from tools.evaluation_tables import render_evaluation
    from tools.look import build_facts, format_count, print_json, print_result
    from trainer.config import TrainSettings

    settings = read_settings(TrainSettings, settings_file, overrides or [])
    is_first_rank = os.environ.get("RANK", "0") == "0"
    place = choose_place(address, workers, cpus, gpus)
    report = run_train(settings, quiet=quiet or not is_first_rank, place=place)
    if is_first_rank and as_json:
        print_json(describe_report(report))
    elif is_first_rank:
        facts = [
            ("output", settings.output),
            ("steps", f"{format_count(report.steps)} of {format_count(settings.steps)}"),
            ("skipped", format_count(report.skipped_steps) if report.skipped_steps else None),
            ("positions", format_count(report.positions)),
            ("student", report.student),
            ("next", "run the same command again to go on" if report.interrupted else None),
        ]
        evaluation = () if report.evaluation is None else (render_evaluation(report.evaluation, "Held-out records"),)
        print_result(build_facts(facts), *evaluation)
    if report.interrupted and not is_first_rank:
        raise typer.Exit(4)
    if report.interrupted:
        raise OutsideError(
            f"{settings.output}: expected {format_count(settings.steps)} steps, found that the run was asked to stop "
            f"after {format_count(report.steps)}; run the same command again to go on"
        )


def run_train(settings: TrainSettings, *, quiet: bool = False, place: Place | None = None) -> TrainReport:
    """Train with a progress bar on stderr; see `trainer.loop.train`, and `cluster.train.run_train` for a cluster."""
    from tools.look import show_progress
    from trainer.progress import StepResult

    with show_progress("train", quiet=quiet) as report:

        def show(result: StepResult) -> None:
            figures = f"loss {result.loss:.3f}  KL {result.bucket_kl:.3f}  text {result.cross_entropy:.3f}"
            report(result.step, settings.steps, figures)

        if place is None:
            from trainer.loop import train

            return train(settings, on_step=show)
        with place.join() as demand:
            from cluster.train import run_train

            return run_train(settings, demand=demand, workers=place.workers or 1, on_step=show)


def describe_report(report: TrainReport) -> dict[str, object]:
    """A report as plain values."""
    return {
        "steps": report.steps,
        "skipped_steps": report.skipped_steps,
        "positions": report.positions,
        "interrupted": report.interrupted,
        "student": None if report.student is None else str(report.student),
        "evaluation": None if report.evaluation is None else report.evaluation.to_json(),
    }


if __name__ == "__main__":
    from tools.cli import main

    main("train")
