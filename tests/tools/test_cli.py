"""The command line as a whole: help, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT

from logitstore import __version__
from logitstore.errors import IncompatibleStoreError, OutsideError, ShapeError
from tools.logs import set_up_logs

VERBS = (
    "quickstart",
    "plan",
    "capture",
    "status",
    "verify",
    "gc",
    "inspect",
    "diff",
    "report",
    "query",
    "train",
    "sweep",
    "evaluate",
    "export",
    "submit capture",
    "submit train",
    "submit sweep",
    "submit follow",
    "submit status",
    "submit stop",
    "convert export",
    "convert import",
)
HEAVY = ("torch", "ray", "transformers", "numpy", "pyarrow", "pydantic", "fsspec", "yaml")


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_shows_an_example_whose_options_exist(verb: str, logitstore: Any) -> None:
    text, _ = logitstore(*verb.split(), "--help")
    examples, _, reference = text.partition("Example:")[2].partition(
        "Arguments:" if verb != "quickstart" else "Options:"
    )
    assert f"logitstore {verb}" in examples
    options = set(re.findall(r"--[a-z-]+", " ".join(re.findall(rf"logitstore {verb}.*", examples))))
    assert options <= set(re.findall(r"--[a-z-]+", reference))


def test_help_lists_every_verb_and_loads_nothing_heavy() -> None:
    code = (
        "import atexit, sys\n"
        "from tools.cli import main\n"
        f"atexit.register(lambda: print('heavy:', *(set({HEAVY}) & set(sys.modules)), file=sys.stderr))\n"
        "main()"
    )
    result = run_python(code, "--help")
    assert result.returncode == 0
    assert [verb for verb in VERBS if f"\n  {verb.split()[0]} " not in result.stdout] == []
    assert result.stderr.strip() == "heavy:"


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "quickstart"])
def test_module_of_a_verb_runs_as_a_program(verb: str) -> None:
    module, *rest = verb.split()
    command = [sys.executable, "-m", f"tools.{module}", *rest, "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"Usage: logitstore {verb} ")


def test_version_prints_the_version_of_the_library(logitstore: Any) -> None:
    assert logitstore("--version") == (f"logitstore {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["unheard-of"],
        ["status"],
        ["status", "nowhere", "--unheard-of"],
        ["status", "nowhere"],
        ["inspect", "nowhere/0.parquet"],
        ["gc", "nowhere"],
        ["verify", "nowhere"],
        ["capture", "nowhere.yaml"],
        ["plan", "nowhere.yaml"],
        ["train", "nowhere.yaml"],
        ["evaluate", "student", "--store", "nowhere"],
        ["evaluate", "student", "--store", "nowhere", "--all", "--held-out-source", "test"],
        ["evaluate", "student", "--store", "nowhere", "--held-out-fraction", "2"],
        ["inspect", "nowhere", "--positions", "0:4"],
    ],
    ids=" ".join,
)
def test_command_with_wrong_arguments_ends_with_2_and_prints_no_result(arguments: list[str], logitstore: Any) -> None:
    stdout, stderr = logitstore(*arguments, exit_code=2)
    assert stdout == ""
    assert "rror: " in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (IncompatibleStoreError("store: expected format 1, found 2; update"), 3),
        (OutsideError("store: the storage does not answer; run the command again"), 4),
    ],
)
def test_error_of_the_project_becomes_its_message_and_its_exit_code(
    error: Exception, exit_code: int, logitstore: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(files: object) -> None:
        raise error

    monkeypatch.setattr("tools.store_status.read_status", fail)
    stdout, stderr = logitstore("status", "store", exit_code=exit_code)
    assert (stdout, stderr) == ("", f"error: {error}\n")


def test_interrupted_command_ends_with_130_and_says_how_to_go_on(
    logitstore: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(files: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.store_status.read_status", interrupt)
    stdout, stderr = logitstore("status", "store", exit_code=130)
    assert stdout == ""
    assert "the same command goes on" in stderr


@pytest.mark.parametrize("error", ["ZeroDivisionError", ShapeError.__name__])
def test_bug_ends_with_1_and_a_traceback(error: str) -> None:
    code = (
        "import tools.store_status\n"
        "from logitstore.errors import *\n"
        f"def fail(files): raise {error}('a bug')\n"
        "tools.store_status.read_status = fail\n"
        "from tools.cli import main\n"
        "main('status')"
    )
    result = run_python(code, "store")
    assert (result.returncode, result.stdout) == (1, "")
    assert "Traceback" in result.stderr
    assert f"{error}: a bug" in result.stderr


@pytest.mark.parametrize(
    ("module", "verb", "extra"),
    [("ray", "capture", "teacher,ray"), ("torch", "plan", "teacher"), ("torch", "train", "train")],
)
def test_command_without_an_optional_package_names_the_extra_that_brings_it(
    module: str, verb: str, extra: str, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("{store: s, corpus: {files: [x]}, teacher: {model: m}}")
    if verb == "train":
        settings.write_text("{store: s, student: {model: m}, global_batch_sequences: 1, steps: 1, output: o}")
    code = f"import sys; sys.modules[{module!r}] = None\nfrom tools.cli import main\nmain({verb!r})"
    result = run_python(code, str(settings))
    assert (result.returncode, result.stdout) == (2, "")
    assert f"pip install 'logitstore[{extra}]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_output_whose_reader_leaves_early_ends_without_a_traceback(small_store_url: str) -> None:
    code = (
        "import os, sys\n"
        "read, write = os.pipe()\n"
        "os.close(read); os.dup2(write, 1)\n"
        "from tools.cli import main\n"
        "main('inspect')"
    )
    result = run_python(code, small_store_url)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize("variable", ["NO_COLOR", None])
def test_output_that_is_no_terminal_or_is_asked_to_be_plain_has_no_colours(
    variable: str | None, small_store_url: str, logitstore: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv(variable, "1")
        monkeypatch.setattr("rich.console.Console.is_terminal", True)
    assert "\x1b[3" not in logitstore("inspect", small_store_url)[0]


def test_output_has_no_blanks_at_the_ends_of_its_lines(small_store_url: str, logitstore: Any) -> None:
    stdout, _ = logitstore("inspect", small_store_url)
    assert [line for line in stdout.splitlines() if line != line.rstrip()] == []
    assert stdout.endswith("\n")
    assert not stdout.endswith("\n\n")


def test_training_that_was_asked_to_stop_reports_and_ends_with_4(
    tmp_path: Path, logitstore: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.loop import TrainReport

    stopped = TrainReport(steps=3, positions=99, interrupted=True, evaluation=None, student=None, skipped_steps=1)
    monkeypatch.setattr("trainer.loop.train", lambda settings, on_step: stopped)
    settings = tmp_path / "train.yaml"
    settings.write_text("{store: s, student: {model: m}, global_batch_sequences: 1, steps: 7, output: o}")
    report = logitstore.json("train", settings, exit_code=4)
    assert (report["steps"], report["interrupted"], report["student"]) == (3, True, None)
    assert report["skipped_steps"] == 1
    assert "run the same command again" in logitstore("train", settings, exit_code=4)[0]


def test_libraries_that_complain_about_themselves_are_heard_on_request_alone(logitstore: Any) -> None:
    heard = {}
    for verbose in (True, False):  # in this order, so that other tests find them quiet
        set_up_logs(quiet=False, verbose=verbose)
        heard[verbose] = logging.getLogger("torchao").isEnabledFor(logging.WARNING)
    assert heard == {True: True, False: False}
