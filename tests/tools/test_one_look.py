"""Every verb, as the command line itself lists them: the same options, the same help, the same manners.

A new verb is found by itself. It has to be run in `RUNS`, or be named in `TOO_DEAR` with the reason.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import typer
import yaml
from fake_jobs import ADDRESS, FakeRayClient

from tools.cli import app
from trainer.evaluation import Evaluation
from trainer.loop import TrainReport

ESCAPE = "\x1b"
STYLE = re.compile(r"\x1b\[[0-9;]*m")
ERROR = re.compile(r"error: [^\n]+?: expected [^\n]+, found:? [^\n]+\n")

# Options that mean several things, and how many; every other option is explained in the same words everywhere.
MEANINGS = {
    "--address": 3,  # a cluster to capture on, one to train on, a head's dashboard
    "--batch-tokens": 2,
    "--device": 2,  # of a benchmark that knows two of them alone
    "--folder": 3,
    "--hidden-size": 4,
    "--json": 2,  # rows of a query are all of them there, unlike in its table
    "--layers": 3,
    "--manifest": 3,  # of readers of manifests, and of those who see what is committed now
    "--method": 3,
    "--no-wait": 2,
    "--output": 2,
    "--positions": 6,
    "--precision": 2,
    "--quick": 2,
    "--records": 3,
    "--repeats": 2,
    "--sequences": 3,
    "--steps": 2,
    "--teacher": 2,
    "--tokenizer": 5,
    "--top": 3,
    "--top-k": 4,
    "--units": 2,
    "--vocab-size": 5,
    "--workers": 3,
}

# Verbs that run models or Ray when all goes well: tests of their own run them.
TOO_DEAR = {
    "quickstart": "runs everything",
    "plan": "runs a teacher",
    "capture": "runs a teacher and Ray",
    "evaluate": "runs students",
    "export": "runs a student",
    "benchmark capture": "runs a teacher",
    "benchmark capture-vllm": "runs vLLM",
    "benchmark codec": "takes seconds",
    "benchmark driver": "takes seconds",
    "benchmark loss": "takes seconds",
    "benchmark methods": "trains students",
    "benchmark scale": "takes seconds",
    "benchmark stream": "takes seconds",
    "benchmark vocabularies": "trains students",
    "benchmark train": "trains students",
}


class Place(NamedTuple):
    """What verbs are run on: a store, a folder of one's own, a file of settings for each kind, a teacher's folder."""

    store: str
    folder: Path
    settings: Path
    teacher: Path


def list_export(place: Place) -> list[object]:
    return ["convert", "export", place.store, place.folder / "out", "--layout", "distillkit"]


def list_submission(verb: str, place: Place) -> list[object]:
    return ["submit", verb, place.settings / f"{verb}.yaml", "--address", ADDRESS, "--name", f"{verb}-7"]


RUNS: dict[str, Callable[[Place], list[object]]] = {
    "status": lambda place: ["status", place.store],
    "verify": lambda place: ["verify", place.store],
    "gc": lambda place: ["gc", place.store, "--grace-hours", 0],
    "inspect": lambda place: ["inspect", place.store],
    "diff": lambda place: ["diff", place.store, place.store],
    "report": lambda place: ["report", place.store, "--output", place.folder / "page.html"],
    "query": lambda place: ["query", place.store, "SELECT count(*) AS n, 0.0 / 0.0 AS nothing FROM positions"],
    "train": lambda place: ["train", place.settings / "train.yaml"],
    "sweep": lambda place: ["sweep", place.settings / "sweep.yaml", "--dry-run"],
    "submit capture": lambda place: list_submission("capture", place),
    "submit train": lambda place: list_submission("train", place),
    "submit sweep": lambda place: list_submission("sweep", place),
    "submit follow": lambda place: ["submit", "follow", "capture-1", "--address", ADDRESS],
    "submit status": lambda place: ["submit", "status", "--address", ADDRESS],
    "submit stop": lambda place: ["submit", "stop", "capture-1", "--address", ADDRESS],
    "convert export": list_export,
    "convert import": lambda place: [
        *("convert", "import", place.folder / "out", place.folder / "in", "--layout", "distillkit"),
        *("--teacher", "big", "--tokenizer", place.teacher),
    ],
    "benchmark method-cost": lambda _: [
        *("benchmark", "method-cost", "--vocab-size", 300, "--hidden-size", 8, "--positions", 2, "--repeats", 1)
    ],
    "benchmark storage": lambda place: [
        *("benchmark", "storage", "--url", place.folder / "scratch", "--megabytes", 1, "--repeats", 1)
    ],
}

# An address where nothing is, or a value that cannot be.
MISTAKES: dict[str, list[str]] = {
    "plan": ["nowhere.yaml"],
    "capture": ["nowhere.yaml"],
    "status": ["nowhere"],
    "verify": ["nowhere"],
    "gc": ["nowhere"],
    "inspect": ["nowhere"],
    "diff": ["nowhere", "nowhere"],
    "report": ["nowhere", "--output", "page.html"],
    "query": ["nowhere", "SELECT 1"],
    "train": ["nowhere.yaml"],
    "sweep": ["nowhere.yaml"],
    "evaluate": ["student", "--store", "nowhere", "--all"],
    "export": ["nowhere", "out", "--to", "int8"],
    "submit capture": ["nowhere.yaml", "--address", ADDRESS],
    "submit train": ["nowhere.yaml", "--address", ADDRESS],
    "submit sweep": ["nowhere.yaml", "--address", ADDRESS],
    "submit follow": ["capture-1", "--address", "nowhere"],
    "submit status": ["--address", "nowhere"],
    "submit stop": ["capture-1", "--address", "nowhere"],
    "convert export": ["nowhere", "out", "--layout", "axolotl"],
    "convert import": [*("nowhere", "in", "--layout", "axolotl"), *("--teacher", "big", "--tokenizer", "{teacher}")],
    "benchmark capture": ["--hidden-size", "65"],
    "benchmark capture-vllm": ["--hidden-size", "65"],
    "benchmark codec": ["--positions", "1"],
    "benchmark driver": ["--units", "1"],
    "benchmark loss": ["--method", "magic"],
    "benchmark method-cost": ["--device", "abacus"],
    "benchmark methods": ["--width", "17"],
    "benchmark scale": ["--folder", "{settings}"],
    "benchmark storage": ["--url", "nowhere://at/all"],
    "benchmark stream": ["--folder", "{settings}"],
    "benchmark vocabularies": ["nowhere"],
    "benchmark train": ["--device", "abacus"],
    "quickstart": ["--folder", "{settings}"],
}


def list_verbs(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if children is None:
        yield name, command
        return
    for verb, child in children.items():
        yield from list_verbs(child, f"{name} {verb}".strip())


VERBS = dict(list_verbs(typer.main.get_command(app)))


@pytest.fixture(scope="module")
def settings_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    run = {"store": "s", "global_batch_sequences": 8, "steps": 3, "output": str(folder / "o")}
    (folder / "capture.yaml").write_text("{store: 's3://bucket/store', corpus: {files: [x]}, teacher: {model: m}}")
    (folder / "train.yaml").write_text(yaml.safe_dump({**run, "student": {"model": "m"}}))
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**run, "students": {"a": {"model": "m"}}}))
    return folder


@pytest.fixture
def place(
    tmp_path: Path,
    settings_folder: Path,
    teacher_folder: Path,
    text_store: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    """A small store; a head that knows jobs; a training that went astray."""
    astray = Evaluation(
        positions=99,
        lm_loss=math.nan,
        perplexity=math.inf,
        teacher_lm_loss=None,
        bucket_kl=math.nan,
        overlap=None,
        top1_agreement=None,
        calibration_error=math.nan,
        bin_positions=(99,),
        bin_confidence=(math.nan,),
        bin_accuracy=(0.0,),
    )
    done = TrainReport(steps=3, positions=99, interrupted=False, evaluation=astray, student=None, skipped_steps=0)
    monkeypatch.setattr("trainer.loop.train", lambda settings, on_step: done)
    monkeypatch.setattr("cluster.job_client._POLL_SECONDS", 0.0)
    monkeypatch.setattr("cluster.job_client._open", lambda address: FakeRayClient())
    store = text_store("def read(path):\n    return path\n").url
    return Place(store=store, folder=tmp_path, settings=settings_folder, teacher=teacher_folder)


def build_arguments(verb: str, place: Place, logitstore: Any) -> list[str]:
    if verb == "query":
        pytest.importorskip("duckdb")
    if verb == "convert import":
        logitstore(*list_export(place))
    return [str(argument) for argument in RUNS[verb](place)]


def refuse_constant(name: str) -> NoReturn:
    raise AssertionError(f"{name} is no JSON")


def run_on_terminal(arguments: list[str], monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """What a command in this process writes where stdout and stderr are a terminal; it has to end with 0."""
    for name, value in {"TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    ours, theirs = os.openpty()
    shown: list[bytes] = []

    def read() -> None:
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other side is closed
                return
            shown.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with os.fdopen(theirs, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            patch.setattr(sys, "stderr", terminal)
            with pytest.raises(SystemExit) as ended:
                app(args=arguments, prog_name="logitstore")
    finally:
        reader.join()
        os.close(ours)
    text = b"".join(shown).decode()
    assert not ended.value.code, text
    return text


@pytest.mark.parametrize("verb", VERBS)
def test_verb_has_an_example_and_the_options_that_all_have(verb: str) -> None:
    command = VERBS[verb]
    assert f"\b\nExample:\n  logitstore {verb}" in command.help.replace("    \b", "\b").replace("\n    ", "\n")
    options = {name for parameter in command.params for name in parameter.opts}
    assert {"--json", "--quiet", "-q", "--verbose", "-v"} <= options


@pytest.mark.parametrize("verb", VERBS)
def test_verb_explains_every_option_and_argument(verb: str) -> None:
    assert [parameter.name for parameter in VERBS[verb].params if not parameter.help] == []


def test_option_of_several_verbs_is_explained_in_the_same_words() -> None:
    texts: dict[str, set[str]] = defaultdict(set)
    for command in VERBS.values():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                texts[max(parameter.opts, key=len)].add(parameter.help)
    assert {name: len(helps) for name, helps in texts.items() if len(helps) > 1} == MEANINGS


def test_every_verb_is_run_here_or_is_named_with_a_reason() -> None:
    assert RUNS.keys() | TOO_DEAR.keys() == VERBS.keys()
    assert RUNS.keys() & TOO_DEAR.keys() == set()
    assert MISTAKES.keys() == VERBS.keys()


@pytest.mark.parametrize("verb", RUNS)
def test_verb_prints_one_strict_json_document_and_nothing_on_stderr_when_quiet(
    verb: str, place: Place, logitstore: Any
) -> None:
    stdout, stderr = logitstore(*build_arguments(verb, place, logitstore), "--json", "--quiet")
    assert json.loads(stdout, parse_constant=refuse_constant) is not None
    assert stderr == ""


@pytest.mark.parametrize("verb", RUNS)
def test_verb_in_a_pipe_writes_no_escapes_and_draws_nothing(
    verb: str, place: Place, logitstore: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stdout, stderr = logitstore(*build_arguments(verb, place, logitstore))
    assert stdout.strip()
    assert ESCAPE not in stdout + stderr
    assert "━" not in stderr


@pytest.mark.parametrize("verb", RUNS)
def test_verb_on_a_terminal_without_colours_writes_no_styles(
    verb: str, place: Place, logitstore: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = run_on_terminal(build_arguments(verb, place, logitstore), monkeypatch, NO_COLOR="1")
    assert STYLE.findall(shown) == []


def test_terminal_that_cannot_draw_gets_no_escapes_and_no_progress(
    place: Place, logitstore: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = run_on_terminal(build_arguments("verify", place, logitstore), monkeypatch, TERM="dumb")
    assert (ESCAPE in shown, shown.startswith("store")) == (False, True)


def test_terminal_gets_colours_and_progress(place: Place, logitstore: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run_on_terminal(build_arguments("verify", place, logitstore), monkeypatch)
    assert STYLE.search(shown)
    assert "1 of 1" in STYLE.sub("", shown.partition("store")[0])


def test_forced_colours_make_no_terminal_of_a_pipe(
    place: Place, logitstore: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stdout, stderr = logitstore(*build_arguments("verify", place, logitstore))
    assert STYLE.search(stdout)
    assert stderr == ""


@pytest.mark.parametrize("verb", VERBS)
def test_verb_with_a_mistake_ends_with_one_line_in_the_form_of_the_house(
    verb: str, settings_folder: Path, teacher_folder: Path, logitstore: Any
) -> None:
    values = {"teacher": str(teacher_folder), "settings": str(settings_folder)}
    arguments = [argument.format(**values) for argument in MISTAKES[verb]]
    stdout, stderr = logitstore(*verb.split(), *arguments, "--json", exit_code=2)
    assert (stdout, "Traceback" in stderr) == ("", False)
    assert ERROR.fullmatch(stderr), stderr


@pytest.mark.parametrize("verb", VERBS)
def test_verb_with_an_unknown_option_ends_with_one_line_in_the_form_of_the_house(verb: str, logitstore: Any) -> None:
    stdout, stderr = logitstore(*verb.split(), "--unheard-of", exit_code=2)
    assert (stdout, bool(ERROR.fullmatch(stderr))) == ("", True), stderr
    assert f"logitstore {verb}: " in stderr
