"""`logitstore benchmark methods`: what students become of what each capture method keeps of one teacher."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.benchmark.arguments import check_multiple
from tools.benchmark.tables import print_heading, print_table, print_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tools.benchmark.method_students import Outcome


def methods(
    steps: Annotated[int, typer.Option(min=4, help="Optimizer steps of every student.")] = 800,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of 256 positions per step.")] = 16,
    width: Annotated[int, typer.Option(min=16, help="Hidden size of the students, a multiple of 16.")] = 32,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the students.")] = 2,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 8e-3,
    seeds: Annotated[int, typer.Option(min=1, help="Students of every row.")] = 3,
    evaluations: Annotated[int, typer.Option(min=1, help="Evaluations over the run, the last at its end.")] = 2,
    held_out_positions: Annotated[int, typer.Option(min=256, help="Of the text that is evaluated on.")] = 65_536,
    results: Annotated[Path | None, typer.Option(help="Write every figure to this file of JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the last figures into this SVG.")] = None,
) -> None:
    """Train students on what each capture method keeps of the quickstart's teacher, on the same batches of real text.

    Text is the source of the interpreter's own library; held-out files were seen by no one. Figures are against the
    teacher's whole distribution. The default takes an hour and a half of a core.

    \b
    Example:
      logitstore benchmark methods --steps 100 --seeds 1
    """
    from tools.benchmark.method_students import LENGTH, LESSONS, School, build_pupil, load_teacher_config, teach

    check_multiple("--width", width, of=16)
    school = School(
        steps=steps,
        sequences=sequences,
        width=width,
        layers=layers,
        learning_rate=learning_rate,
        held_out_positions=held_out_positions,
        evaluations=evaluations,
    )
    parameters = build_pupil(LESSONS[0], 0, school, load_teacher_config()).model.num_parameters()
    positions = steps * sequences * LENGTH
    command = f"logitstore benchmark methods --steps {steps} --sequences {sequences} --width {width} --layers {layers}"
    print_heading(f"{command} --learning-rate {learning_rate:g} --seeds {seeds}", "torch", "transformers")
    print_text(
        f"Teacher: the quickstart's, 5.5 million parameters, 4,096 ids. Students: {parameters:,} parameters, "
        f"{positions:,} positions, {positions / parameters:.0f} per parameter.\n{seeds} seeds, ± their standard "
        f"deviation; all students see the same batches. Held out: {held_out_positions:,} positions."
    )
    outcomes = teach(LESSONS, range(seeds), school, lambda found: write_outcomes(found, results))
    print_outcomes(outcomes)
    if plot is not None:
        from tools.benchmark.method_plot import draw_outcomes

        draw_outcomes(outcomes, plot)


def write_outcomes(outcomes: Sequence[Outcome], file: Path | None) -> None:
    """Write every figure of every evaluation as JSON, where a file was asked for."""
    if file is not None:
        file.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n", encoding="utf-8")


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """A row per lesson, from the last evaluation: mean over seeds ± standard deviation."""
    from tools.benchmark.method_students import compute_share_of_full

    lessons = list(dict.fromkeys(outcome.lesson for outcome in outcomes))
    final = {lesson: [o.history[-1][1] for o in outcomes if o.lesson == lesson] for lesson in lessons}
    seeds = range(min(map(len, final.values())))
    shares = [compute_share_of_full({lesson: final[lesson][seed].lm_loss for lesson in lessons}) for seed in seeds]
    rows = []
    for lesson in lessons:
        entries = next(outcome.entries for outcome in outcomes if outcome.lesson == lesson)
        found = final[lesson]
        rows.append(
            [
                lesson,
                "–" if lesson == "cross-entropy" else f"{entries:,.1f}",
                format_spread([one.lm_loss for one in found], 3),
                format_spread([share[lesson] for share in shares], 0),
                format_spread([one.bucket_kl for one in found], 3),
                format_spread([one.calibration_error for one in found], 1),
                format_spread([one.overlap for one in found], 3),
                format_spread([one.top1_agreement for one in found], 3),
            ]
        )
    print_table(
        [
            "taught by",
            "entries",
            "LM loss",
            "% of the way from cross-entropy to whole",
            "KL to the teacher",
            "calibration error, %",
            "Σ min(p, q)",
            "top-1 agreement",
        ],
        rows,
    )
    teacher_loss = final[lessons[0]][0].teacher_lm_loss
    assert teacher_loss is not None  # it was computed here
    print_text(f"The teacher's own LM loss is {teacher_loss:.3f}.")


def format_spread(figures: Sequence[float | None], digits: int) -> str:
    """`2.345 ± 0.002`; without the second where there is one value. None, which no whole distribution gives, is NaN."""
    values = [math.nan if figure is None else figure for figure in figures]
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
