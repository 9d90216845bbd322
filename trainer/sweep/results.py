"""What the runs of a sweep reached, side by side."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from trainer.config import TrainSettings
from trainer.run_identity import describe_settings
from trainer.sweep.record import RunResult
from trainer.writing import writing

# Figures of an evaluation that runs are compared by.
FIGURES = (
    "lm_loss",
    "bits_per_byte",
    "bucket_kl",
    "kl_estimate",
    "calibration_error",
    "overlap",
    "top1_agreement",
    "gap_closed",
)
# Settings that a run may go on with others of, and that decide what a student has learned all the same.
_OF_RECORDS = {"store", "manifest", "further_teachers", "further_corpora", "document_weights", "skip_steps"}
_RUN_COLUMNS = ("status", "parameters", "steps", "skipped_steps", "positions")


class MeanResult(BaseModel):
    """Runs that differ in their seeds alone.

    Attributes:
        labels: that they have in common.
        runs: how many are finished.
        parameters: of each student.
        mean, spread: of their figures by name: the mean, and the standard deviation with n - 1.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    labels: dict[str, str]
    runs: int
    parameters: int | None
    mean: dict[str, float]
    spread: dict[str, float]


def compute_gaps(results: Sequence[RunResult], settings: Mapping[str, TrainSettings]) -> list[RunResult]:
    """The results, each with how much of the way it came from a student of the text alone to the teacher.

    That is in percent of language-model loss. It is known where the teacher's loss is, and a finished run of the sweep
    differs in nothing but that its loss is the cross-entropy.

    Args:
        results: of all runs.
        settings: of the runs, by name.
    """
    of_text = {
        _describe_without_loss(settings[result.name]): result.evaluation["lm_loss"]
        for result in results
        if settings[result.name].loss.kind == "cross_entropy" and result.evaluation is not None
    }
    return [
        result.model_copy(
            update={"gap_closed": _compute_gap(result, of_text.get(_describe_without_loss(settings[result.name])))}
        )
        for result in results
    ]


def _compute_gap(result: RunResult, text_loss: float | None) -> float | None:
    if result.evaluation is None or text_loss is None:
        return None
    teacher_loss = result.evaluation.get("teacher_lm_loss")
    if teacher_loss is None or teacher_loss >= text_loss:
        return None
    return 100 * (text_loss - result.evaluation["lm_loss"]) / (text_loss - teacher_loss)


def _describe_without_loss(settings: TrainSettings) -> str:
    identity = {**describe_settings(settings), **settings.model_dump(mode="json", include=_OF_RECORDS)}
    return repr(sorted((name, repr(value)) for name, value in identity.items() if not name.startswith("loss.")))


def list_figures(result: RunResult) -> dict[str, float]:
    """The figures of a run that are known, by name."""
    values = {**(result.evaluation or {}), "gap_closed": result.gap_closed}
    return {name: value for name in FIGURES if (value := values.get(name)) is not None}


def compute_means(results: Sequence[RunResult]) -> list[MeanResult]:
    """Means over the finished runs that have the same labels but for their seeds; of two runs or more."""
    groups: dict[tuple[tuple[str, str], ...], list[RunResult]] = {}
    for result in results:
        if result.status == "finished" and "seed" in result.labels:
            labels = tuple((name, value) for name, value in result.labels.items() if name != "seed")
            groups.setdefault(labels, []).append(result)
    return [_compute_mean(dict(labels), runs) for labels, runs in groups.items() if len(runs) > 1]


def _compute_mean(labels: dict[str, str], runs: Sequence[RunResult]) -> MeanResult:
    tables = [{**list_figures(run), "seconds": run.seconds} for run in runs]
    names = [name for name in tables[0] if all(name in table for table in tables)]
    return MeanResult(
        labels=labels,
        runs=len(runs),
        parameters=runs[0].parameters,
        mean={name: statistics.fmean(table[name] for table in tables) for name in names},
        spread={name: statistics.stdev(table[name] for table in tables) for name in names},
    )


def write_csv(results: Sequence[RunResult], path: Path) -> None:
    """Write a line for every run, in full precision; what is not known is left empty."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        with temporary.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(_list_lines(results))
        temporary.replace(path)


def _list_lines(results: Sequence[RunResult]) -> Iterator[list[object]]:
    labels = list(dict.fromkeys(name for result in results for name in result.labels))
    yield ["name", *labels, *_RUN_COLUMNS, *FIGURES, "seconds", "cpus", "gpus", "output", "error"]
    for result in results:
        figures = list_figures(result)
        yield [
            result.name,
            *(result.labels.get(name) for name in labels),
            *(getattr(result, name) for name in _RUN_COLUMNS),
            *(figures.get(name) for name in FIGURES),
            round(result.seconds, 3),
            result.cpus,
            result.gpus,
            result.output,
            result.error,
        ]
