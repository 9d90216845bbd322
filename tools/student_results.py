"""One self-contained HTML page about a store and the students that were taught from it: opens from disk, no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from logitstore import __version__
from logitstore.shard.summary import ENTROPY_BIN_NATS
from tools.charts import Line, build_bar_chart, build_line_chart
from tools.curves import Curve
from tools.page import build_charts, build_facts, build_notes, build_page, build_table, choose_style
from trainer.evaluation import Evaluation

# Label, field of `Evaluation`, format, and whether more is better: the comparison of students, here and in a terminal.
# Rows that a store does not allow, None, are left out.
COMPARED_FIGURES = (
    ("KL to the teacher (nats)", "bucket_kl", ".4f", False),
    ("KL to the teacher, estimated from draws (nats)", "kl_estimate", ".4f", False),
    ("calibration error (%)", "calibration_error", ".2f", False),
    ("LM loss (nats per token)", "lm_loss", ".4f", False),
    ("perplexity", "perplexity", ",.2f", False),
    ("bits per byte of the text", "bits_per_byte", ".4f", False),
    ("KL to the teacher by spans of text (nats)", "span_kl", ".4f", False),
    ("top-1 agreement with the teacher", "top1_agreement", ".4f", True),
    ("overlap, sum of min(p, q)", "overlap", ".4f", True),
)
# What a page says of the figures that have no name of their own elsewhere, by field.
_EXPLANATIONS = {
    "bucket_kl": "KL to the teacher: bucket KL, the KL(teacher ‖ student) over the ids that the store keeps of a "
    "position and one bucket for all others; a lower bound of the KL over the whole vocabulary.",
    "kl_estimate": "KL to the teacher, estimated from draws: the student's cross-entropy to the drawn weights less the "
    "teacher's entropy; an unbiased estimate of the KL(teacher ‖ student) over the whole vocabulary.",
    "span_kl": "KL by spans of text: the KL(teacher ‖ student) about “the text goes on with exactly this span, or it "
    "does not”, mean over spans.",
    "calibration_error": "Calibration error: expected calibration error, how far the probability of the student's "
    "likeliest token is from how often it is right.",
    "overlap": "Overlap: one less the total variation distance, over the same ids and bucket.",
}
# What compares students that read the text as other tokens.
_PER_TEXT = ("bits_per_byte", "span_kl")
_CURVES = (
    ("Distance to the teacher, training batches", "bucket KL, nats", "train/bucket_kl"),
    ("Distance to the teacher, held out", "bucket KL, nats", "held_out/bucket_kl"),
    ("Distance to the teacher, held out", "KL estimated from draws, nats", "held_out/kl_estimate"),
    ("Loss on the text, training batches", "nats per token", "train/cross_entropy"),
    ("Loss on the text, held out", "nats per token", "held_out/lm_loss"),
)


@dataclass(frozen=True, kw_only=True)
class StudentResult:
    """A student: its name, its evaluation on held-out records, and the curves of its training."""

    name: str
    evaluation: Evaluation
    curves: tuple[Curve, ...]


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """What a report shows. `facts` are label and text, in order; `entropy_histogram` counts positions by half nats."""

    title: str
    store: str
    teacher: str
    facts: Mapping[str, str]
    entropy_histogram: Sequence[int]
    students: tuple[StudentResult, ...]


def build_report(data: ReportData) -> str:
    """The page, as text."""
    entropy = build_bar_chart(
        "Entropy of the teacher", "nats", "positions", list(data.entropy_histogram), ENTROPY_BIN_NATS
    )
    positions = data.students[0].evaluation.positions if data.students else 0
    training = [*build_curves(list_curves(data.students)), build_reliability(data.students)]
    body = f"""<h2>What the teacher said</h2>{build_facts(data.facts)}{build_charts([entropy])}
<h2>What the students learned</h2>{build_comparison(data.students, f"On {positions:,} held-out positions")}
<h2>How they got there</h2>{build_charts(training)}"""
    subtitle = f"Store {data.store}, teacher {data.teacher}, logitstore {__version__}"
    return build_page(data.title, subtitle, body)


def build_comparison(students: Sequence[StudentResult], where: str) -> str:
    """A table of the students' figures side by side, under a caption that begins with where they are from."""
    rows = []
    for label, values, form, more_is_better, do_compare in list_compared([student.evaluation for student in students]):
        cells = build_cells(values, form, more_is_better=more_is_better if do_compare else None)
        rows.append([label, *cells])
    notes = [
        text
        for name, text in _EXPLANATIONS.items()
        if any(getattr(student.evaluation, name) is not None for student in students)
    ]
    better = (
        f"; the {'better' if len(students) == 2 else 'best'} figure of each row is bold" if len(students) > 1 else ""
    )
    table = build_table(f"{where}{better}.", ["", *(student.name for student in students)], rows)
    return table + build_notes("What the figures are", notes)


def list_compared(
    evaluations: Sequence[Evaluation],
) -> Iterator[tuple[str, list[float | None], str, bool, bool]]:
    """Yield what a table of students has a row for.

    Yields:
        Label, values, format, whether more is better, and whether the values compare: figures per token do not where
        students read the text as other tokens. Figures that none of them has are left out.
    """
    is_same_text = len({evaluation.positions for evaluation in evaluations}) == 1
    for label, name, form, more_is_better in COMPARED_FIGURES:
        values = [getattr(evaluation, name) for evaluation in evaluations]
        if any(value is not None for value in values):
            yield label, values, form, more_is_better, is_same_text or name in _PER_TEXT


def build_cells(values: Sequence[float | None], form: str, *, more_is_better: bool | None) -> list[str]:
    """The cells of a row, the best of several in bold unless they do not compare."""
    best = None if more_is_better is None else find_best(values, more_is_better=more_is_better)
    return [
        "<td>–</td>" if value is None else f"<td{' class=best' if value == best else ''}>{value:{form}}</td>"
        for value in values
    ]


def find_best(values: Sequence[float | None], *, more_is_better: bool) -> float | None:
    """The best of a row's values; None where there is nothing that it is better than."""
    known = {value for value in values if value is not None}
    if len(known) < 2:
        return None
    return max(known) if more_is_better else min(known)


def build_curves(curves_by_name: Mapping[str, Sequence[Curve]]) -> list[str]:
    """Charts of students' training, of every figure that any of them has at more than one step."""
    charts = []
    for title, label, name in _CURVES:
        lines = [
            Line(name=student, points=curve.points, style=choose_style(number))
            for number, (student, curves) in enumerate(curves_by_name.items())
            for curve in curves
            if curve.name == name
        ]
        if any(len(line.points) > 1 for line in lines):
            charts.append(build_line_chart(title, "step", label, lines))
    return charts


def list_curves(students: Sequence[StudentResult]) -> dict[str, tuple[Curve, ...]]:
    """The students' curves by their names."""
    return {student.name: student.curves for student in students}


def build_reliability(
    students: Sequence[StudentResult], *, title: str = "Calibration, held out", with_teacher: bool = False
) -> str:
    """How often the likeliest token is right, against how sure one is of it: on the diagonal where calibrated."""
    lines = [Line(name="calibrated", points=((0.0, 0.0), (1.0, 1.0)), style="faint")]
    evaluations = [student.evaluation for student in students]
    if with_teacher and evaluations and evaluations[0].teacher_bin_positions is not None:
        lines.append(_build_reliability_line("teacher", "teacher", evaluations[0], "teacher_"))
    for number, student in enumerate(students):
        lines.append(_build_reliability_line(student.name, choose_style(number), student.evaluation, ""))
    return build_line_chart(title, "probability of the likeliest token", "share that was right", lines)


def _build_reliability_line(name: str, style: str, evaluation: Evaluation, prefix: str) -> Line:
    columns = [getattr(evaluation, f"{prefix}bin_{column}") for column in ("confidence", "accuracy", "positions")]
    filled = [values for values in zip(*columns, strict=True) if values[2]]
    return Line(
        name=name,
        points=tuple((confidence, accuracy) for confidence, accuracy, _ in filled),
        style=style,
        counts=tuple(count for _, _, count in filled),
    )


__all__ = [
    "COMPARED_FIGURES",
    "Curve",
    "ReportData",
    "StudentResult",
    "build_cells",
    "build_comparison",
    "build_curves",
    "build_reliability",
    "build_report",
    "find_best",
    "list_compared",
    "list_curves",
]
