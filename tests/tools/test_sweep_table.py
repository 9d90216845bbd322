"""The table of a sweep's runs, on wide terminals and narrow ones."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tools.sweep_table import build_means_table, build_runs_table
from trainer.sweep.record import RunResult
from trainer.sweep.results import MeanResult

FIGURES = {
    "lm_loss": 6.0236,
    "bucket_kl": 3.474,
    "calibration_error": 1.43,
    "overlap": 0.2175,
    "top1_agreement": 0.1086,
}


def render(table: object, width: int) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def build_runs() -> list[RunResult]:
    common = {"labels": {}, "stream": 0, "all_steps": 200, "parameters": 248_000, "output": "o", "positions": 204_000}
    return [
        RunResult.model_validate(
            {
                **common,
                "name": "h48-distilled",
                "status": "finished",
                "steps": 200,
                "seconds": 49.0,
                "evaluation": FIGURES,
            }
        ),
        RunResult.model_validate({**common, "name": "h80-distilled", "status": "failed", "steps": 20}),
    ]


@pytest.mark.parametrize("width", [40, 80, 110])
def test_runs_of_a_table_that_is_too_wide_keep_names_and_whole_figures(width: int) -> None:
    lines = render(build_runs_table(build_runs()), width)
    words = " ".join(lines).split()
    assert {"6.0236", "3.4740", "1.43", "0.2175", "0.1086"} <= set(words)
    assert max(len(line) for line in lines) <= width
    heads = [line for line in lines if line.startswith("run")]
    assert len(heads) == sum(line.startswith("h48-distilled") for line in lines) > 1


def test_table_that_has_room_is_in_one_piece() -> None:
    lines = render(build_runs_table(build_runs()), 160)
    assert sum(line.startswith("run") for line in lines) == 1
    mean = MeanResult(labels={"student": "h48"}, runs=2, parameters=1, mean=FIGURES, spread=FIGURES)
    assert sum(line.startswith("runs") for line in render(build_means_table([mean]), 160)) == 1
    assert sum(line.startswith("runs") for line in render(build_means_table([mean]), 80)) > 1
