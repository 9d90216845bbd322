"""Evaluations in a terminal: one student's figures, several students side by side, and parts of the records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tools.look import build_table, format_count, format_share

if TYPE_CHECKING:
    from rich.table import Table

    from trainer.evaluation import Evaluation, Figures, GroupFigures
    from trainer.harness import TaskFigure

# Rows of a table of labels; --json and the report have all of them.
_LISTED_LABELS = 20


def render_evaluation(evaluation: Evaluation, title: str) -> Table:
    """A table of an evaluation's figures."""
    loss = evaluation.teacher_lm_loss
    rows = [
        ("loss on the text", f"{evaluation.lm_loss:.4f}", "nats per token"),
        ("perplexity", f"{evaluation.perplexity:,.2f}", ""),
        ("the teacher's loss", "unknown" if loss is None else f"{loss:.4f}", "nats per token, on the same text"),
        *_list_comparisons(evaluation),
        ("calibration error", f"{evaluation.calibration_error:.2f}%", "of the likeliest token's probability"),
    ]
    if evaluation.teacher_calibration_error is not None:
        rows.append(("the teacher's", f"{evaluation.teacher_calibration_error:.2f}%", "on the same text"))
    rows.append(("positions", format_count(evaluation.positions), ""))
    return build_table(title, ["figure", "#value", ""], rows)


def _list_comparisons(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """What the store's kind of support says about student and teacher, and what it does not."""
    if evaluation.bits_per_byte is not None:  # of another tokenizer
        return _list_span_figures(evaluation)
    rows = [
        ("KL(teacher, student)", evaluation.bucket_kl, ".4f", "nats, outside of the support as one bucket"),
        ("KL(teacher, student)", evaluation.kl_estimate, ".4f", "nats, estimated from drawn supports"),
        ("overlap", evaluation.overlap, ".4f", "Σ min(teacher, student), 1 is best"),
    ]
    lines = [(label, format(value, form), remark) for label, value, form, remark in rows if value is not None]
    if evaluation.top1_agreement is not None:
        return [*lines, ("top-1 agreement", format_share(evaluation.top1_agreement), "same likeliest token")]
    if evaluation.overlap is None:
        lines.append(("overlap", "–", "not available from drawn supports"))
    kind = "given ids" if evaluation.bucket_kl is not None else "drawn supports"
    return [*lines, ("top-1 agreement", "–", f"not available from {kind}")]


def _list_span_figures(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """What there is to say of a student that reads the text as other tokens than its teacher."""
    rows = [
        ("bits per byte", evaluation.bits_per_byte, ".4f", "of the text that both predict"),
        ("the teacher's", evaluation.teacher_bits_per_byte, ".4f", "bits per byte, on the same text"),
        ("KL(teacher, student)", evaluation.span_kl, ".4f", "nats per span of text"),
        ("compared", evaluation.compared_bytes, ".1%", "of the text"),
    ]
    return [(label, format(value, form), remark) for label, value, form, remark in rows if value is not None]


def render_comparison(evaluations: Mapping[str, Evaluation], title: str) -> Table:
    """Students by name, side by side; the best figure of a row in bold."""
    from rich.text import Text

    from tools.student_results import find_best, list_compared

    rows = []
    for label, values, form, more_is_better, do_compare in list_compared(list(evaluations.values())):
        best = find_best(values, more_is_better=more_is_better) if do_compare else None
        cells = [
            Text(
                "–" if value is None else format(value, form),
                style="bold" if value is not None and value == best else "",
            )
            for value in values
        ]
        remark = "more is better" if more_is_better else "less is better"
        rows.append([label, *cells, remark if do_compare else "per token, of other tokens"])
    rows.append(["positions", *(format_count(evaluation.positions) for evaluation in evaluations.values()), ""])
    return build_table(title, ["", *(f"#{name}" for name in evaluations), ""], rows)


def list_part_tables(evaluations: Mapping[str, Evaluation]) -> list[Table]:
    """Tables by source, label and entropy, of the parts that the records have several of."""
    tables = []
    if sources := {name: e.by_source for name, e in evaluations.items() if len(e.by_source) > 1}:
        tables.append(_render_groups("By source", sources))
    if labels := {name: e.by_label for name, e in evaluations.items() if len(e.by_label) > 1}:
        more = max(map(len, labels.values())) - _LISTED_LABELS
        title = "By label" + (f", {more} more in --json" if more > 0 else "")
        tables.append(_render_groups(title, {name: groups[:_LISTED_LABELS] for name, groups in labels.items()}))
    if entropies := {name: e for name, e in evaluations.items() if len(e.by_entropy) > 1}:
        tables.append(_render_entropies(entropies))
    return tables


def _render_groups(title: str, groups: Mapping[str, Sequence[GroupFigures]]) -> Table:
    """Perplexity of every group; of one student alone, its distance from the teacher too."""
    is_one = len(groups) == 1
    columns = ["", "#positions", "#teacher", *(["#perplexity", "#KL"] if is_one else [f"#{name}" for name in groups])]
    rows = []
    for of_students in zip(*groups.values(), strict=True):
        first = of_students[0]
        name = "others" if first.name is None else first.name or "(none)"
        cells = [_format_kl(first)] if is_one else []
        cells = [*(f"{group.perplexity:,.2f}" for group in of_students), *cells]
        rows.append([name, format_count(first.positions), _format_teacher(first), *cells])
    return build_table(f"{title}: perplexity" + (", and KL in nats" if is_one else ""), columns, rows)


def _render_entropies(evaluations: Mapping[str, Evaluation]) -> Table:
    """Agreement in every bin of the teacher's entropy; KL where that is not known, or of one student alone."""
    first, *others = evaluations.values()
    shown = []
    if first.top1_agreement is not None:
        shown.append(("agreement", _format_agreement))
    if not shown or not others:
        shown.append(("KL", _format_kl))
    columns = ["entropy", "#positions"]
    columns += [f"#{name}" if others else f"#{what}" for what, _ in shown for name in evaluations]
    rows = []
    for of_students in zip(*(evaluation.by_entropy for evaluation in evaluations.values()), strict=True):
        part = of_students[0]
        name = f"{part.start:g} to {part.stop:g}" if part.stop else f"{part.start:g} and more"
        cells = [write(part) for _, write in shown for part in of_students]
        rows.append([name, format_count(part.positions), *cells])
    units = {"agreement": "top-1 agreement", "KL": "KL in nats"}
    return build_table(f"By the teacher's entropy: {', '.join(units[what] for what, _ in shown)}", columns, rows)


def _format_teacher(group: GroupFigures) -> str:
    perplexity = group.teacher_perplexity
    return "–" if perplexity is None else f"{perplexity:,.2f}"


def _format_kl(part: Figures) -> str:
    kl = part.kl_estimate if part.bucket_kl is None else part.bucket_kl
    return "–" if kl is None else f"{kl:.4f}"


def _format_agreement(part: Figures) -> str:
    return "–" if part.top1_agreement is None else format_share(part.top1_agreement)


def render_tasks(tasks: Mapping[str, Sequence[TaskFigure]]) -> Table:
    """Every metric of every task, of the students side by side."""
    rows = []
    for figures in zip(*tasks.values(), strict=True):
        first = figures[0]
        cells = [
            f"{figure.value:.4f}" + ("" if figure.standard_error is None else f" ± {figure.standard_error:.4f}")
            for figure in figures
        ]
        rows.append(
            [first.task, first.metric, *cells, "" if first.documents is None else format_count(first.documents)]
        )
    return build_table("lm-evaluation-harness", ["task", "metric", *(f"#{name}" for name in tasks), "#documents"], rows)
