"""`logitstore benchmark scale`: what a store of a million units costs those who do not read its records."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tools.benchmark.arguments import check_folder
from tools.benchmark.own_process import measure_apart
from tools.benchmark.tables import print_heading, print_table, print_text, tell_step

_STEPS = "tools.benchmark.scale_steps"
# Of what takes seconds; the others are run once.
_REPEATS = 3


def scale(
    units: Annotated[int, typer.Option(min=2, help="Units of the simulated store.")] = 1_000_000,
    row_groups: Annotated[int, typer.Option(min=1, help="Row groups of each unit, with 4 records each.")] = 4,
    folder: Annotated[Path | None, typer.Option(help="An empty folder to build it in and to leave it in.")] = None,
) -> None:
    """Plan, list, write manifests, open, order, sum, verify and collect garbage in a simulated store.

    A million units take 2 files each, 5 GB of disk and some minutes.

    \b
    Example:
      logitstore benchmark scale --units 100000
    """

    if folder is not None:
        check_folder(folder)
    command = f"logitstore benchmark scale --units {units} --row-groups {row_groups}"
    print_heading(command, "pyarrow", "pydantic", "numpy")
    idle = measure_apart(_STEPS, "nothing", ".", 0).peak_bytes / 2**20
    print_text(
        "Simulated: the corpus files (only named), what the commits say, and the shards, which are sparse files of\n"
        f"the right size without a byte in them. Real: {units:,} commit files and as many data files on a local disk\n"
        "(pages cached), plan, manifests and all code. Peak: resident memory of a process of its own for each step,\n"
        f"including the {idle:.0f} MiB of a Python that has imported pyarrow and pydantic."
    )
    if folder is not None:
        _measure_all(folder, units, row_groups)
        return
    with tempfile.TemporaryDirectory(prefix="logitstore-scale-") as temporary:
        _measure_all(Path(temporary), units, row_groups)


def _measure_all(folder: Path, units: int, row_groups: int) -> None:
    from logitstore.store.files import StoreFiles
    from logitstore.store.plan import read_plan
    from tools.benchmark.simulated_store import write_units

    new = max(1, units // 1000)
    rows = [_run("plan a corpus, create plan.json", "plan", folder, units)]
    fingerprint = read_plan(StoreFiles(str(folder))).compute_fingerprint()
    write_units(folder, range(units - new), row_groups, fingerprint, are_old=True)
    rows += [
        _run("read plan.json, fingerprint, unit table", "read_the_plan", folder, units, _REPEATS),
        _run("list what is left to do, local files", "list_to_do", folder, units, _REPEATS),
        _run("list commits, entries as of s3fs", "list_bucket", folder, units, _REPEATS),
        _run("write a manifest from nothing", "write_the_manifest", folder, units),
    ]
    write_units(folder, range(units - new, units), row_groups, fingerprint, are_old=False)
    rows += [
        _run(f"write a manifest, {new:,} new commits", "write_the_manifest", folder, units),
        _run("write a manifest, nothing new", "write_the_manifest", folder, units),
        _run("open the store", "open_the_store", folder, units, _REPEATS),
        _run("order an epoch, first batch", "order", folder, units, _REPEATS),
        _run("sum the statistics", "sum_statistics", folder, units, _REPEATS),
        _run("gc: find garbage", "find_the_garbage", folder, units),
        _run("verify --quick", "verify_quickly", folder, units),
    ]
    print_table(["step", "seconds", "of a processor", "peak MiB", "outcome"], rows)


def _run(title: str, step: str, folder: Path, units: int, repeats: int = 1) -> list[str]:
    """A row of the table: the median, with half the spread of the repetitions."""
    tell_step(title)
    runs = sorted((measure_apart(_STEPS, step, folder, units) for _ in range(repeats)), key=lambda run: run.seconds)
    median = runs[len(runs) // 2]
    spread = f" ±{(runs[-1].seconds - runs[0].seconds) / 2:.1f}" if repeats > 1 else ""
    return [
        title,
        f"{median.seconds:.1f}{spread}",
        f"{median.processor_seconds:.1f}",
        f"{max(run.peak_bytes for run in runs) / 2**20:,.0f}",
        median.outcome,
    ]
