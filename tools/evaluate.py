"""`logitstore evaluate`: hold students against the text and against what the teacher said."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tools.logs import AsJson, Quiet, Verbose, set_up_logs

if TYPE_CHECKING:
    from rich.table import Table

    from logitstore.stream.selection import HeldOut
    from logitstore.stream.where import Where
    from trainer.config import EvaluateSettings
    from trainer.evaluation import Evaluation
    from trainer.harness import TaskFigure


def command(
    students: Annotated[
        list[str],
        typer.Argument(metavar="STUDENT_FOLDER...", help="Folders of students, or names on the hub."),
    ],
    store: Annotated[str, typer.Option(metavar="STORE", help="URL or folder of the store.")],
    held_out_source: Annotated[
        str | None, typer.Option(metavar="NAME", help="Evaluate on the records of this corpus source.")
    ] = None,
    held_out_fraction: Annotated[
        float | None, typer.Option(metavar="PART", help="Evaluate on what a run with this fraction held out.")
    ] = None,
    every_record: Annotated[bool, typer.Option("--all", help="Evaluate on every record of the store.")] = False,
    where: Annotated[
        str | None,
        typer.Option(metavar="CONDITIONS", help="Of these, take records that meet conditions, as in train.yaml."),
    ] = None,
    manifest: Annotated[int | None, typer.Option(min=1, help="Number of the manifest; the newest otherwise.")] = None,
    micro_batch_sequences: Annotated[
        int | None, typer.Option(min=1, help="Sequences per forward pass; 8 unless tokens are given.")
    ] = None,
    micro_batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Positions per forward pass, padding included.")
    ] = None,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Run students under autocast to bfloat16.")] = False,
    device: Annotated[str | None, typer.Option(help="Device of torch; a GPU where there is one otherwise.")] = None,
    harness: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="Also run a task of the lm-evaluation-harness; may be given again."),
    ] = None,
    harness_folder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="YAML files of further tasks for --harness.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="PAGE.html", help="Write a page with tables and charts.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Evaluate students on records of a store.

    Their loss on the text, their distance from the teacher, how well their probabilities are calibrated; by source,
    label and entropy of the teacher. Several students are evaluated on the same records and shown side by side.

    \b
    Example:
      logitstore evaluate runs/small/student --store runs/store --held-out-source test
      logitstore evaluate runs/small/student --store runs/store --held-out-fraction 0.05 --json
      logitstore evaluate runs/a/student runs/b/student --store runs/store --all --report students.html
      logitstore evaluate runs/a/student --store runs/store --all --where '{labels: [de], perplexity: {max: 60}}'
      torchrun --nproc-per-node 8 -m tools.evaluate runs/a/student --store runs/store --all
    """
    set_up_logs(quiet=quiet, verbose=verbose)
    held_out = choose_records(held_out_source, held_out_fraction, every_record=every_record)
    from logitstore.settings import build_settings
    from trainer.config import EvaluateSettings

    values = {
        "store": store,
        "manifest": manifest or "latest",
        "student": students[0],
        "where": None if where is None else read_conditions(where),
        "held_out": held_out,
        "micro_batch_sequences": micro_batch_sequences,
        "micro_batch_tokens": micro_batch_tokens,
        "precision": "bfloat16" if bfloat16 else "float32",
        "device": device,
    }
    settings = build_settings(EvaluateSettings, values, where="logitstore evaluate")
    check_outputs(report, harness, harness_folder)
    settings, evaluations = evaluate_by_name(students, settings, quiet=quiet)
    tasks = run_tasks(students, settings, harness or [], harness_folder)
    if os.environ.get("RANK", "0") != "0":
        return
    if report is not None:
        from tools.evaluation_report import write_report

        write_report(report, students, evaluations, settings)
    show(evaluations, tasks, students, settings, as_json=as_json)


def choose_records(source: str | None, fraction: float | None, *, every_record: bool) -> HeldOut | None:
    """The records that three options name between them; None for all.

    Raises:
        ConfigError: not exactly one of the options is given, or the fraction is none.
    """
    from logitstore.errors import ConfigError
    from logitstore.settings import build_settings
    from logitstore.stream.selection import HeldOut

    given = [name for name, is_given in _list_choices(source, fraction, every_record=every_record) if is_given]
    if len(given) != 1:
        raise ConfigError(
            "logitstore evaluate: expected exactly one of --held-out-source, --held-out-fraction and --all, found "
            f"{' and '.join(given) or 'none'}; a figure on records that the student was trained on flatters it"
        )
    if every_record:
        return None
    return build_settings(HeldOut, {"source": source, "fraction": fraction}, where=given[0])


def _list_choices(source: str | None, fraction: float | None, *, every_record: bool) -> list[tuple[str, bool]]:
    return [
        ("--held-out-source", source is not None),
        ("--held-out-fraction", fraction is not None),
        ("--all", every_record),
    ]


def read_conditions(text: str) -> Where:
    """Conditions as YAML, such as `{labels: [de], perplexity: {max: 60}}`.

    Raises:
        ConfigError: it is no YAML mapping, or no conditions.
    """
    import yaml

    from logitstore.errors import ConfigError
    from logitstore.settings import build_settings
    from logitstore.stream.where import Where

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict):
        raise ConfigError(
            f"--where: expected conditions such as '{{labels: [de], perplexity: {{max: 60}}}}', found {text!r}"
        )
    return build_settings(Where, values, where="--where")


def check_outputs(report: Path | None, harness: Sequence[str] | None, harness_folder: Path | None) -> None:
    """Check before anything takes time that what it leads to can be had.

    Raises:
        ConfigError: the report cannot be written, or the options for the harness do not go together.
    """
    from logitstore.errors import ConfigError
    from tools.page import check_page_path

    if harness_folder is not None and (not harness or not harness_folder.is_dir()):
        found = "no --harness" if not harness else f"no folder {str(harness_folder)!r}"
        raise ConfigError(f"--harness-folder: expected a folder of tasks, and --harness beside it, found {found}")
    if harness and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--harness: expected one process, found several; run the tasks without torchrun")
    if report is not None:
        check_page_path(report, "--report")


def evaluate_by_name(
    students: Sequence[str], settings: EvaluateSettings, *, quiet: bool
) -> tuple[EvaluateSettings, dict[str, Evaluation]]:
    """Evaluations by the students' short names, with a progress bar on stderr; on every rank.

    The settings come back with the number of the manifest that all of them are of.
    """
    from tools.look import show_progress
    from trainer.distributed import join_processes
    from trainer.evaluate import evaluate_students, pin_manifest

    names = name_students(students)
    evaluations = {}
    with (
        join_processes(settings.device) as processes,
        show_progress("evaluate", quiet=quiet or len(students) < 2) as progress,
    ):
        settings = pin_manifest(settings, processes)
        progress(0, len(students), names[0])
        for number, (name, evaluation) in enumerate(zip(names, evaluate_students(settings, students), strict=True), 1):
            evaluations[name] = evaluation
            progress(number, len(students), names[min(number, len(students) - 1)])
    return settings, evaluations


def name_students(students: Sequence[str]) -> list[str]:
    """Short names that tell students apart: of the run that left a folder, else the end of its path.

    Raises:
        ConfigError: a student is given twice.
    """
    from logitstore.errors import ConfigError

    parts = [[part for part in Path(student).parts if part != "student"] or [student] for student in students]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"logitstore evaluate: expected different students, found {', '.join(students)}; give each once")


def run_tasks(
    students: Sequence[str], settings: EvaluateSettings, tasks: Sequence[str], folder: Path | None
) -> dict[str, list[TaskFigure]]:
    """What every student reached in tasks of the lm-evaluation-harness, by its short name."""
    if not tasks:
        return {}
    from trainer.harness import run_harness

    task_folder = None if folder is None else str(folder)
    return {
        name: run_harness(student, tasks, task_folder=task_folder, device=settings.device)
        for name, student in zip(name_students(students), students, strict=True)
    }


def show(
    evaluations: dict[str, Evaluation],
    tasks: dict[str, list[TaskFigure]],
    students: Sequence[str],
    settings: EvaluateSettings,
    *,
    as_json: bool,
) -> None:
    """Print the result: the figures of one student, or those of several side by side."""
    from tools.evaluation_tables import list_part_tables, render_comparison, render_evaluation, render_tasks
    from tools.look import print_json, print_result

    if as_json:
        print_json(describe_evaluations(evaluations, tasks, students, settings))
        return
    where = f"{settings.store}, manifest {settings.manifest}"
    tables: list[Table] = []
    if len(evaluations) == 1:
        [evaluation] = evaluations.values()
        tables.append(render_evaluation(evaluation, f"{students[0]} on {where}"))
    else:
        tables.append(render_comparison(evaluations, f"{len(students)} students on {where}"))
    tables += list_part_tables(evaluations)
    if tasks:
        tables.append(render_tasks(tasks))
    print_result(*tables)


def describe_evaluations(
    evaluations: dict[str, Evaluation],
    tasks: dict[str, list[TaskFigure]],
    students: Sequence[str],
    settings: EvaluateSettings,
) -> dict[str, Any]:
    """Plain values: the figures of one student, or `students` with those of each."""
    from dataclasses import asdict

    described = []
    for student, (name, evaluation) in zip(students, evaluations.items(), strict=True):
        harness = {"harness": [asdict(figure) for figure in tasks[name]]} if tasks else {}
        origin = {"name": name, "student": student, "manifest": settings.manifest}
        described.append({**origin, **evaluation.to_json(), **harness})
    return described[0] if len(described) == 1 else {"students": described}


if __name__ == "__main__":
    from tools.cli import main

    main("evaluate")
