"""A picture of a sweep: what its students reached, over how large they are or what they cost."""

from __future__ import annotations

import importlib.util
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tools.sweep_table import Reserved
    from trainer.sweep.record import RunResult
    from trainer.sweep.training import SweepReport

_LOGGER = logging.getLogger(__name__)
_PANELS = (
    ("bucket_kl", "KL to the teacher, nats"),
    ("kl_estimate", "KL to the teacher, estimated, nats"),
    ("lm_loss", "LM loss, nats per token"),
    ("calibration_error", "calibration error, %"),
)
# Of Okabe and Ito, who chose them for all eyes; the marker tells the same.
_STYLES = (
    ("#0072b2", "o"),
    ("#d55e00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#e69f00", "v"),
    ("#56b4e9", "P"),
    ("#000000", "X"),
)


# Ticks with names: how many at most, and by what factor they have to be apart.
_MAX_TICKS, _APART = 6, 1.25


@dataclass(frozen=True, kw_only=True)
class _Cost:
    """What the figures stand over."""

    label: str
    measure: Callable[[RunResult], float]
    is_wide: bool  # over so many orders that a logarithm shows them better


def write_plot(report: SweepReport, path: Path) -> Path | None:
    """Write an SVG with a dot for every finished run, and return its path.

    None, with a word in the log, where there is nothing to draw or nothing to draw it with.
    """
    runs = [run for run in report.runs if run.status == "finished" and run.evaluation]
    if not runs:
        return None
    if importlib.util.find_spec("matplotlib") is None:
        _LOGGER.warning("no plot: matplotlib is not installed; pip install 'logitstore[plot]' and run again")
        return None
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = [panel for panel in _PANELS if any(panel[0] in (run.evaluation or {}) for run in runs)]
    series = _group(runs)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "logitstore", "font.size": 9}):
        costs = _choose_costs(runs)
        figure = Figure(figsize=(3.4 * len(panels), 3.0 * len(costs) + 0.3), layout="constrained")
        drawn = figure.subplots(len(costs), len(panels), squeeze=False)
        for row, cost in zip(drawn, costs, strict=True):
            for axes, (name, title) in zip(row, panels, strict=True):
                _draw_panel(axes, name, title, series, cost)
        if len(series) > 1:
            handles, labels = drawn[0][0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(series)), frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")
    return path


def _group(runs: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Runs by all in which they differ but student and seed; these are one line of the picture."""
    series: dict[str, list[RunResult]] = {}
    for run in runs:
        name = ", ".join(value for label, value in run.labels.items() if label not in ("student", "seed"))
        series.setdefault(name or "students", []).append(run)
    return series


def _choose_costs(runs: Sequence[RunResult]) -> list[_Cost]:
    """Parameters where students differ in them; else positions where runs do; else seconds.

    Beside them, or in place of seconds, the GPU or CPU seconds of runs that had a part of a cluster to themselves.
    """
    from tools.sweep_table import find_reserved

    costs: list[_Cost] = []
    for label, measure in (("parameters", _count_parameters), ("positions trained on", _count_positions)):
        values = [measure(run) for run in runs]
        if not costs and max(values) > 1.01 * min(values) > 0:
            costs.append(_Cost(label=label, measure=measure, is_wide=max(values) > 3 * min(values)))
    reserved = find_reserved(runs)
    if reserved is not None:
        measure = partial(_measure_reserved, reserved)
        costs.append(_Cost(label=f"{reserved.label} seconds", measure=measure, is_wide=False))
    return costs or [_Cost(label="seconds", measure=lambda run: run.seconds, is_wide=False)]


def _measure_reserved(reserved: Reserved, run: RunResult) -> float:
    cost = reserved.measure(run)
    return run.seconds if cost is None else cost


def _count_parameters(run: RunResult) -> float:
    return float(run.parameters or 0)


def _count_positions(run: RunResult) -> float:
    return float(run.positions)


def _draw_panel(axes: Axes, name: str, title: str, series: dict[str, list[RunResult]], cost: _Cost) -> None:
    for (label, runs), (colour, marker) in zip(series.items(), _repeat_styles(len(series)), strict=True):
        known = [run for run in runs if name in (run.evaluation or {})]
        points = sorted((cost.measure(run), (run.evaluation or {})[name]) for run in known)
        axes.plot(*_unzip(points), marker, color=colour, markersize=5, alpha=0.75, label=label)
        if cost.label == "parameters":
            axes.plot(*_unzip(_mean_by_place(points)), "-", color=colour, linewidth=1, alpha=0.6)
    if name == "lm_loss":
        _draw_teacher(axes, [run for runs in series.values() for run in runs])
    if cost.is_wide:
        axes.set_xscale("log")
    _set_ticks(axes, cost, [run for runs in series.values() for run in runs])
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(cost.label)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _set_ticks(axes: Axes, cost: _Cost, runs: Sequence[RunResult]) -> None:
    """Where students are few and apart, each has a tick of its own, with its name and size."""
    places = sorted({cost.measure(run) for run in runs})
    low, high = places[0], places[-1]
    is_apart = all(after > _APART * before for before, after in itertools.pairwise(places))
    if not cost.label.endswith("seconds") and len(places) <= _MAX_TICKS and is_apart:
        axes.set_xticks(
            places, [_name_place(place, [run for run in runs if cost.measure(run) == place]) for place in places]
        )
        axes.minorticks_off()
    if cost.is_wide:
        axes.set_xlim(low / (high / low) ** 0.1, high * (high / low) ** 0.1)
    elif high > low:
        axes.set_xlim(low - 0.1 * (high - low), high + 0.1 * (high - low))


def _name_place(place: float, runs: Sequence[RunResult]) -> str:
    from tools.look import format_short

    students = {run.labels.get("student", "") for run in runs}
    return f"{format_short(place)}\n{students.pop() if len(students) == 1 else ''}".rstrip()


def _draw_teacher(axes: Axes, runs: Sequence[RunResult]) -> None:
    losses = {
        run.evaluation["teacher_lm_loss"] for run in runs if run.evaluation and "teacher_lm_loss" in run.evaluation
    }
    if len(losses) == 1:
        [loss] = losses
        axes.axhline(loss, color="#555555", linewidth=1, linestyle="--")
        axes.annotate("teacher", (0.99, loss), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)


def _mean_by_place(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    places: dict[float, list[float]] = {}
    for x, y in points:
        places.setdefault(x, []).append(y)
    return [(x, sum(values) / len(values)) for x, values in places.items()]


def _unzip(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _repeat_styles(count: int) -> list[tuple[str, str]]:
    return [_STYLES[number % len(_STYLES)] for number in range(count)]
