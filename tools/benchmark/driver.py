"""`logitstore benchmark driver`: what a capture's driver costs, without the actors and without the network."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tools.benchmark.own_process import Measured, measure_apart
from tools.benchmark.tables import print_heading, print_table, print_text, tell_step

_STEPS = "tools.benchmark.driver_steps"
_RAY_UNITS = 20_000
# Seconds of an actor: of a big teacher, and of a small one or a unit cut small.
_UNIT_SECONDS = (100, 5)


def driver(
    units: Annotated[int, typer.Option(min=10, help="Units of the capture.")] = 1_000_000,
    actors: Annotated[int, typer.Option(min=2, help="Actors.")] = 2000,
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Measure the calls of Ray, too.")] = True,
) -> None:
    """Drive a capture whose actors answer at once, as fast as the driver can.

    What is measured is the driver's own code. Actors and storage are simulated; in the last steps there are two real
    actors of Ray, which do nothing, with as many calls under way as that number of actors would have.

    \b
    Example:
      logitstore benchmark driver --units 100000 --actors 500
    """

    print_heading(f"logitstore benchmark driver --units {units} --actors {actors}", "ray", "pydantic")
    measured: dict[str, tuple[int, Measured]] = {}
    with tempfile.TemporaryDirectory(prefix="logitstore-driver-") as folder:
        idle = measure_apart(_STEPS, "nothing", folder, 0, 0).peak_bytes
        steps = _list_steps(units, actors, ray=ray)
        for title, step, size, count in steps:
            tell_step(title)
            for old in Path(folder).iterdir():
                old.unlink()
            measured[title] = size, measure_apart(_STEPS, step, folder, size, count)
    print_text(
        "Simulated: the actors, and a bucket whose listings are those of s3fs. Real: look at the store, plan, queue,\n"
        "pool, loop, progress and metrics. Peak: resident memory of a process of its own for each step, including the\n"
        f"{idle / 2**20:.0f} MiB of a Python that has imported the driver and Ray."
    )
    header = ["step", "seconds", "of a processor", "µs per unit", "units/s", "peak MiB", "outcome"]
    print_table(header, [_build_row(title, size, run) for title, (size, run) in measured.items()])
    others = (_RESUME, steps[-1][0] if ray else _RESUME)
    slowest = max(run.processor_seconds / size for title, (size, run) in measured.items() if title not in others)
    sizes = " or ".join(f"{seconds / slowest:,.0f} actors with units of {seconds} s" for seconds in _UNIT_SECONDS)
    print_text(f"By the slowest of these steps a driver's core is full with {1 / slowest:,.0f} units/s: {sizes}.")


_RESUME = "resume: command to first unit, half committed"


def _list_steps(units: int, actors: int, *, ray: bool) -> list[tuple[str, str, int, int]]:
    """Title, name, units and actors of each."""
    fewer = max(2, actors // 10)
    steps = [
        (_RESUME, "resume", units, actors),
        (f"{actors:,} actors", "in_bulk", units, actors),
        (f"{fewer:,} actors", "in_bulk", units, fewer),
        (f"{actors:,} actors, a look at all for each unit", "one_by_one", units, actors),
        (f"{actors:,} actors, 1% failures, 0.1% deaths", "with_failures", units, actors),
    ]
    if ray:
        some = min(units, _RAY_UNITS)
        steps.append((f"Ray: {2 * actors:,} calls, callbacks", "by_callbacks", some, actors))
        steps.append((f"Ray: {2 * actors:,} calls, `ray.wait` on all", "by_ray_wait", some, actors))
    return steps


def _build_row(title: str, units: int, run: Measured) -> list[str]:
    is_resume = title == _RESUME
    per_unit = f"{1e6 * run.processor_seconds / units:.1f}"
    return [
        title,
        f"{run.seconds:.1f}",
        f"{run.processor_seconds:.1f}",
        "" if is_resume else per_unit,
        "" if is_resume else f"{units / run.seconds:,.0f}",
        f"{run.peak_bytes / 2**20:,.0f}",
        run.outcome,
    ]
