"""One self-contained HTML page about evaluations of students on the same records: opens from disk, no network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from logitstore import __version__
from logitstore.store.logit_store import LogitStore
from tools.charts import DotRow, Line, build_dot_chart, build_line_chart
from tools.curves import read_curves
from tools.look import print_note
from tools.page import build_charts, build_facts, build_page, build_table, choose_style
from tools.student_results import (
    StudentResult,
    build_cells,
    build_comparison,
    build_curves,
    build_reliability,
    list_curves,
)
from trainer.config import EvaluateSettings
from trainer.evaluation import EntropyFigures, Evaluation, GroupFigures

# Rows of a chart of sources or labels; the table below it has all of them.
_CHART_ROWS = 16
# Points of a line by entropy stand at the middle of their bin; the last bin has none, and stands this far in.
_OPEN_BIN_NATS = 0.25
_KL_LABELS = {"bucket_kl": "bucket KL", "kl_estimate": "KL estimated from draws"}


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What a report shows. `facts` are label and text, in order; the students' curves may be empty."""

    title: str
    store: str
    teacher: str
    facts: Mapping[str, str]
    students: tuple[StudentResult, ...]


def write_report(
    path: Path, students: Sequence[str], evaluations: Mapping[str, Evaluation], settings: EvaluateSettings
) -> None:
    """Write the page; training curves come from the metrics.jsonl of the run that left a student's folder."""
    store = LogitStore.open(settings.store, settings.manifest, settings.storage_options)
    results = tuple(
        StudentResult(name=name, evaluation=evaluation, curves=read_curves(Path(student).parent / "metrics.jsonl"))
        for student, (name, evaluation) in zip(students, evaluations.items(), strict=True)
    )
    data = EvaluationReport(
        title=f"Evaluation of {', '.join(evaluations)}"
        if len(results) < 4
        else f"Evaluation of {len(results)} students",
        store=store.url,
        teacher=store.plan.teacher.model,
        facts={"manifest": str(store.manifest_number), "records": describe_records(settings)},
        students=results,
    )
    path.write_text(build_evaluation_report(data), encoding="utf-8")
    print_note(f"the report is in {path}")


def describe_records(settings: EvaluateSettings) -> str:
    """Which records were evaluated on, in words."""
    held_out = settings.held_out
    if held_out is None:
        which = "all"
    elif held_out.source is not None:
        which = f"source {held_out.source}"
    else:
        which = f"held-out fraction {held_out.fraction:g}"
    if settings.where is None:
        return which
    conditions = settings.where.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    return f"{which}, where {json.dumps(conditions, ensure_ascii=False)}"


def build_evaluation_report(data: EvaluationReport) -> str:
    """The page, as text."""
    students = data.students
    positions = students[0].evaluation.positions
    sections = [
        build_facts(data.facts),
        "<h2>Figures</h2>",
        build_comparison(students, f"On {positions:,} positions of the store"),
        build_charts(
            [build_reliability(students, title="Calibration", with_teacher=True), *build_entropy_charts(students)]
        ),
        _build_entropy_table(students),
        _build_groups("Sources", students, lambda evaluation: evaluation.by_source),
        _build_groups("Labels", students, lambda evaluation: evaluation.by_label),
    ]
    if curves := build_charts(build_curves(list_curves(students))):
        sections += ["<h2>Training</h2>", curves]
    subtitle = f"Store {data.store}, teacher {data.teacher}, logitstore {__version__}"
    return build_page(data.title, subtitle, "\n".join(sections))


def build_entropy_charts(students: Sequence[StudentResult]) -> list[str]:
    """Charts of the students' agreement with the teacher, and distance from it, by the teacher's entropy."""
    label = "entropy of the teacher, nats"
    return [
        _build_entropy_chart("Agreement by entropy", label, "same likeliest token", "top1_agreement", students),
        *(
            _build_entropy_chart("Distance to the teacher by entropy", label, f"{kl}, nats", name, students)
            for name, kl in _KL_LABELS.items()
        ),
    ]


def _build_entropy_chart(title: str, x_label: str, y_label: str, name: str, students: Sequence[StudentResult]) -> str:
    lines = []
    for number, student in enumerate(students):
        parts = [part for part in student.evaluation.by_entropy if getattr(part, name) is not None]
        lines.append(
            Line(
                name=student.name,
                points=tuple((_place(part), getattr(part, name)) for part in parts),
                style=choose_style(number),
                counts=tuple(part.positions for part in parts),
            )
        )
    return build_line_chart(title, x_label, y_label, lines)


def _place(part: EntropyFigures) -> float:
    return part.start + _OPEN_BIN_NATS if part.stop is None else (part.start + part.stop) / 2


def _build_entropy_table(students: Sequence[StudentResult]) -> str:
    """Agreement or distance in every bin, folded away below the charts."""
    students = [student for student in students if student.evaluation.by_entropy]
    if not students:
        return ""
    first = students[0].evaluation
    what, name, form, more_is_better = _choose_figure(first)
    rows = []
    for i, part in enumerate(first.by_entropy):
        stop = "and more" if part.stop is None else f"to {part.stop:g}"
        values = [getattr(student.evaluation.by_entropy[i], name) for student in students]
        cells = build_cells(values, form, more_is_better=more_is_better)
        rows.append([f"{part.start:g} {stop}", f"<td>{part.positions:,}</td>", *cells])
    columns = ["entropy, nats", "positions", *(student.name for student in students)]
    table = build_table(f"{what}, by the teacher's entropy.", columns, rows)
    return f"<details><summary>By entropy, in numbers</summary>{table}</details>"


def _choose_figure(evaluation: Evaluation) -> tuple[str, str, str, bool]:
    """Label, field, format and whether more is better, of what there is to say about every bin."""
    if evaluation.top1_agreement is not None:
        return "Agreement on the likeliest token", "top1_agreement", ".1%", True
    name = "kl_estimate" if evaluation.bucket_kl is None else "bucket_kl"
    return f"{_KL_LABELS[name][:1].upper()}{_KL_LABELS[name][1:]} to the teacher, nats", name, ".4f", False


def _build_groups(
    name: str,
    students: Sequence[StudentResult],
    select: Callable[[Evaluation], tuple[GroupFigures, ...]],
) -> str:
    """Perplexity and distance from the teacher in every group; nothing of fewer than two groups."""
    chosen = [(i, student) for i, student in enumerate(students) if len(select(student.evaluation)) > 1]
    if not chosen:
        return ""
    groups = [select(student.evaluation) for _, student in chosen]
    kl = _KL_LABELS["kl_estimate" if chosen[0][1].evaluation.bucket_kl is None else "bucket_kl"]
    perplexity_dots, kl_dots, rows = [], [], []
    for of_students in zip(*groups, strict=True):
        first = of_students[0]
        label = "others" if first.name is None else first.name or "(none)"
        perplexities = [group.perplexity for group in of_students]
        kls = [group.kl_estimate if group.bucket_kl is None else group.bucket_kl for group in of_students]
        perplexity_dots.append(DotRow(name=label, values=(first.teacher_perplexity, *perplexities)))
        kl_dots.append(DotRow(name=label, values=kls))
        cells = build_cells([first.teacher_perplexity], ",.2f", more_is_better=False)
        cells += build_cells(perplexities, ",.2f", more_is_better=False)
        cells += build_cells(kls, ".4f", more_is_better=False)
        rows.append([label, f"<td>{first.positions:,}</td>", *cells])
    of = f"by {name.lower().removesuffix('s')}"
    series = [(student.name, choose_style(i)) for i, student in chosen]
    charts = [
        build_dot_chart(
            f"Perplexity {of}", "perplexity", [("teacher", "teacher"), *series], perplexity_dots[:_CHART_ROWS]
        ),
        build_dot_chart(f"Distance to the teacher {of}", f"{kl}, nats", series, kl_dots[:_CHART_ROWS]),
    ]
    names = [student.name for _, student in chosen]
    columns = ["", "positions", "teacher", *names, *(f"KL, {name}" for name in names)]
    caption = f"Perplexity of the teacher and the students, and each student's {kl} to the teacher in nats."
    return f"<h2>{name}</h2>{build_charts(charts)}{build_table(caption, columns, rows)}"
