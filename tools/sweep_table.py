"""The runs of a sweep as tables: before it, and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tools.look import SplitTable, build_table, format_count, format_seconds, format_short

if TYPE_CHECKING:
    from rich.table import Table

    from trainer.sweep.record import RunResult
    from trainer.sweep.results import MeanResult
    from trainer.sweep.settings import SweepRun

# Label, name and format of a figure, and whether more of it is better.
FIGURES = (
    ("LM loss", "lm_loss", "{:.4f}", False),
    ("bits/byte", "bits_per_byte", "{:.4f}", False),
    ("KL", "bucket_kl", "{:.4f}", False),
    ("KL est.", "kl_estimate", "{:.4f}", False),
    ("calib. %", "calibration_error", "{:.2f}", False),
    ("overlap", "overlap", "{:.4f}", True),
    ("top-1", "top1_agreement", "{:.4f}", True),
    ("CE→teacher", "gap_closed", "{:.0f}%", True),
)


@dataclass(frozen=True, kw_only=True)
class Reserved:
    """What runs cost where they had a part of a cluster to themselves.

    Attributes:
        label: GPU or CPU.
        measure: seconds of a run times how many of these it had; None of one that ran without a cluster.
    """

    label: str
    measure: Callable[[RunResult], float | None]


def find_reserved(runs: Sequence[RunResult]) -> Reserved | None:
    """GPUs where any run had one, else CPUs; None where no run had a part of a cluster."""
    if any(run.gpus for run in runs):
        return Reserved(label="GPU", measure=lambda run: None if run.gpus is None else run.seconds * run.gpus)
    if any(run.cpus for run in runs):
        return Reserved(label="CPU", measure=lambda run: None if run.cpus is None else run.seconds * run.cpus)
    return None


def build_plan_table(groups: Sequence[Sequence[SweepRun]]) -> Table:
    """Every run with its folder and the stream that it reads."""
    rows = [
        (run.name, str(stream), format_count(run.settings.steps), run.settings.output)
        for stream, group in enumerate(groups)
        for run in group
    ]
    return build_table("Runs; those of one stream share the reading", ["run", "#stream", "#steps", "output"], rows)


def build_runs_table(runs: Sequence[RunResult]) -> SplitTable:
    """Every run with its figures; the best of a column is bold, columns that say nothing are left out."""
    from rich.text import Text

    from trainer.sweep.results import list_figures

    reserved = find_reserved(runs)
    figures = [list_figures(run) for run in runs]
    shown = [figure for figure in FIGURES if any(figure[1] in known for known in figures)]
    # Tokens of two tokenizers are not the same: a loss per token compares nothing then, bits per byte do.
    not_compared = {"lm_loss"} if any("bits_per_byte" in known for known in figures) else set()
    is_whole = all(run.status == "finished" for run in runs)
    rows: list[list[object]] = []
    for run, known in zip(runs, figures, strict=True):
        row: list[object] = [run.name, "" if run.parameters is None else format_short(run.parameters)]
        row += [_describe_steps(run, is_whole=is_whole), format_short(run.positions)]
        for _, name, form, more_is_better in shown:
            values = [other[name] for other in figures if name in other]
            is_best = name in known and known[name] == (max if more_is_better else min)(values)
            is_best = is_best and name not in not_compared
            row.append(Text(form.format(known[name]) if name in known else "–", style="bold" if is_best else ""))
        rows.append([*row, format_seconds(run.seconds), *_describe_cost(run, reserved)])
    columns = ["run", "#params", "#steps", "#positions", *(f"#{label}" for label, *_ in shown), "#time"]
    columns += [] if reserved is None else [f"#{reserved.label} time"]
    return SplitTable("Runs, on held-out records" if shown else "Runs", columns, rows)


def _describe_cost(run: RunResult, reserved: Reserved | None) -> list[str]:
    if reserved is None:
        return []
    cost = reserved.measure(run)
    return ["–" if cost is None else format_seconds(cost)]


def _describe_steps(run: RunResult, *, is_whole: bool) -> str:
    """How far a run is, with what is remarkable about it; where all are finished, that is not."""
    steps = format_count(run.steps)
    steps = steps if is_whole else f"{steps} of {format_count(run.all_steps)}, {run.status}"
    return f"{steps}, {format_count(run.skipped_steps)} skipped" if run.skipped_steps else steps


def build_means_table(means: Sequence[MeanResult]) -> SplitTable:
    """Means over seeds, each with its standard deviation."""
    shown = [figure for figure in FIGURES if any(figure[1] in mean.mean for mean in means)]
    rows = [
        (
            "-".join(mean.labels.values()),
            mean.runs,
            *(
                f"{form.format(mean.mean[name])} ± {form.format(mean.spread[name])}" if name in mean.mean else "–"
                for _, name, form, _ in shown
            ),
        )
        for mean in means
    ]
    columns = ["runs", "#seeds", *(f"#{label}" for label, *_ in shown)]
    return SplitTable("Means over seeds ± standard deviation", columns, rows)


def list_errors(runs: Sequence[RunResult]) -> list[str]:
    """A line for every run that failed."""
    return [f"{run.name} failed: {run.error}" for run in runs if run.status == "failed"]
