"""The report: one page with the right numbers that needs nothing from anywhere."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tools.charts import Line, build_bar_chart, build_line_chart, compute_ticks
from tools.curves import read_curves
from tools.student_results import Curve, ReportData, StudentResult, build_cells, build_report, find_best
from trainer.evaluate import Evaluation


def build_evaluation(bucket_kl: float) -> Evaluation:
    return Evaluation(
        positions=1234,
        lm_loss=2.5,
        perplexity=math.exp(2.5),
        teacher_lm_loss=2.0,
        bucket_kl=bucket_kl,
        overlap=0.7,
        top1_agreement=0.6,
        calibration_error=1.5,
        bin_positions=(10, 0, 20),
        bin_confidence=(0.1, 0.0, 0.9),
        bin_accuracy=(0.2, 0.0, 0.8),
    )


@pytest.fixture
def page() -> str:
    curves = (Curve(name="train/bucket_kl", points=((10, 3.0), (20, 1.5))),)
    students = (
        StudentResult(name="text <only>", evaluation=build_evaluation(0.9), curves=curves),
        StudentResult(name="distilled", evaluation=build_evaluation(0.4), curves=curves),
    )
    return build_report(
        ReportData(
            title="A & B",
            store="/store",
            teacher="Llama",
            facts={"positions": "1"},
            entropy_histogram=(5, 3, 0),
            students=students,
        )
    )


class Balance(HTMLParser):
    """Checks that every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_report_is_well_formed_and_escapes_names(page: str) -> None:
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert "A & B" in parser.texts
    assert "text <only>" in parser.texts


def test_report_needs_nothing_from_anywhere(page: str) -> None:
    assert not re.search(r"https?:|<script|<img|url\(", page)


def test_report_marks_the_better_student_of_each_row(page: str) -> None:
    assert "<td>0.9000</td><td class=best>0.4000</td>" in page
    assert "1,234 held-out positions" in page


def test_report_draws_a_chart_for_every_curve_and_skips_those_without_points(page: str) -> None:
    assert page.count("<svg") == 3  # entropy, the one curve, calibration
    assert 'aria-label="Distance to the teacher, training batches: bucket KL, nats over step"' in page


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (3, 3, [3, 4, 5, 6]), (-1.2, 11, [-2.5, 0, 2.5, 5, 7.5, 10, 12.5])],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, ticks: list[float]) -> None:
    found = compute_ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    if low != high:
        assert found == ticks


def test_line_chart_leaves_out_values_that_are_not_finite() -> None:
    chart = build_line_chart("t", "x", "y", [Line(name="a", points=((0, 1.0), (1, math.nan), (2, 3.0)), style="s0")])
    assert "nan" not in chart
    assert chart.count("<circle") == 2


def test_curves_of_a_run_that_was_made_again_have_every_step_once(tmp_path: Path) -> None:
    steps = [(10, 3.0), (20, 2.0), (30, 1.5), (20, 2.5), (30, 1.0)]
    lines = [json.dumps({"step": step, "held_out/lm_loss": loss}) + "\n" for step, loss in steps]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    [curve] = read_curves(tmp_path / "metrics.jsonl")
    assert curve.points == ((10, 3.0), (20, 2.5), (30, 1.0))


@pytest.mark.parametrize(
    ("values", "best"), [([1.0, 2.0, None], 1.0), ([0.0, 0.0], None), ([0.5, None], None), ([None, None], None)]
)
def test_best_of_a_row_is_better_than_another(values: list[float | None], best: float | None) -> None:
    assert find_best(values, more_is_better=False) == best
    cells = build_cells(values, ".1f", more_is_better=False)
    assert [cell for cell in cells if "best" in cell] == ([] if best is None else [f"<td class=best>{best:.1f}</td>"])


def test_charts_without_values_are_empty() -> None:
    assert build_line_chart("t", "x", "y", []) == build_bar_chart("t", "x", "y", [], 0.5) == ""


def test_report_of_students_on_drawn_supports_leaves_out_what_they_do_not_tell() -> None:
    unknown = {"bucket_kl": None, "overlap": None, "top1_agreement": None}
    students = tuple(
        StudentResult(name=name, evaluation=replace(build_evaluation(0.0), **unknown, kl_estimate=kl), curves=())
        for name, kl in (("text only", 0.7071), ("distilled", 0.2345))
    )
    page = build_report(
        ReportData(title="t", store="s", teacher="m", facts={}, entropy_histogram=(1,), students=students)
    )
    assert "estimated from draws" in page
    assert "<td class=best>0.2345</td>" in page
    assert "top-1 agreement" not in page
    assert "overlap" not in page
