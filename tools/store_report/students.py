"""The page's sections about students: their figures, and the curves of their training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from logitstore.errors import ConfigError
from tools.curves import Curve, read_curves
from tools.evaluate import name_students
from tools.evaluation_report import build_entropy_charts
from tools.page import build_charts
from tools.store_report.token_table import escape_invisible
from tools.student_results import StudentResult, build_comparison, build_curves, build_reliability
from trainer.evaluation import Evaluation

if TYPE_CHECKING:
    from tools.store_report.page import ReportRequest


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a training run left; `evaluation` is its last one, None where it held nothing out."""

    name: str
    evaluation: Evaluation | None
    curves: tuple[Curve, ...]


def name_voices(request: ReportRequest) -> tuple[str, ...]:
    """Short names of the stores and the students, all different."""
    stores = [request.store, *([request.against] if request.against is not None else [])]
    names = [*(name_students(stores) if len(stores) > 1 else ["teacher"])]
    if request.students:
        names += name_students(request.students)
    return tuple(escape_invisible(name if names.count(name) == 1 else f"{name} ({i})") for i, name in enumerate(names))


def read_runs(runs: Sequence[str], students: Sequence[str]) -> tuple[RunResult, ...]:
    """Results of runs, and of those that left students.

    Args:
        runs: folders of runs, or of several.
        students: folders of students, whose runs need not be there.
    Raises:
        ConfigError: a folder has no run in it.
    """
    folders: dict[Path, None] = {}
    for name in runs:
        found = _list_runs(Path(name))
        if not found:
            raise ConfigError(
                f"--run {name}: expected the folder of a training run with its metrics.jsonl, or one of several such "
                "folders, found neither"
            )
        folders.update(dict.fromkeys(found))
    for name in students:
        folder = Path(name) if (Path(name) / "student").is_dir() else Path(name).parent
        if (folder / "metrics.jsonl").exists():
            folders[folder] = None
    names = name_students([str(folder) for folder in folders]) if folders else []
    return tuple(
        RunResult(
            name=escape_invisible(name),
            evaluation=_read_evaluation(folder / "evaluations.jsonl"),
            curves=read_curves(folder / "metrics.jsonl"),
        )
        for name, folder in zip(names, folders, strict=True)
    )


def _list_runs(folder: Path) -> list[Path]:
    if (folder / "metrics.jsonl").exists():
        return [folder]
    return sorted(path.parent for path in folder.glob("*/metrics.jsonl"))


def _read_evaluation(path: Path) -> Evaluation | None:
    """The last whole line of a run's evaluations."""
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].splitlines()
    if not lines:
        return None
    values = json.loads(lines[-1])
    values.pop("step", None)
    return Evaluation.from_json(values)


def build_students(evaluations: Mapping[str, Evaluation], runs: Sequence[RunResult]) -> str:
    """Figures of the students that were run over the records shown, and of runs at their end."""
    here = [StudentResult(name=name, evaluation=one, curves=()) for name, one in evaluations.items()]
    there = [StudentResult(name=run.name, evaluation=run.evaluation, curves=()) for run in runs if run.evaluation]
    parts = [
        _build_figures(here, "On {positions:,} taught positions of the records shown, which it may have learned from"),
        _build_figures(there, "On {positions:,} held-out positions, as the runs say at their end"),
    ]
    return "".join(parts)


def _build_figures(students: Sequence[StudentResult], where: str) -> str:
    if not students:
        return ""
    table = build_comparison(students, where.format(positions=students[0].evaluation.positions))
    charts = [build_reliability(students, title="Calibration", with_teacher=True), *build_entropy_charts(students)]
    return table + build_charts(charts)


def build_training(runs: Sequence[RunResult]) -> str:
    """The curves of runs; nothing without any."""
    return build_charts(build_curves({run.name: run.curves for run in runs}))
