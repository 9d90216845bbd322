"""docs/cluster.md holds to the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from checkout import ROOT
from ray.runtime_env import RuntimeEnv

from cluster.settings import ClusterCaptureSettings
from cluster.submit import STOP_SECONDS_VARIABLE, read_runtime_env
from logitstore.settings import build_settings
from tools.cli import app

PAGE = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
COMMANDS = [
    line.removeprefix("until ").partition(";")[0].partition("  #")[0]
    for line in re.findall(r"^    (?:until )?(logitstore .*)$", PAGE, re.MULTILINE)
]
BLOCKS = {text.split(maxsplit=2)[1].rstrip(":,"): text for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)}


def parse(command: str) -> list[str]:
    """The verbs of a command line, which the command line's own parser has accepted with its arguments."""
    program, *arguments = shlex.split(command)
    assert program == "logitstore"
    found, verbs = typer.main.get_command(app), []
    while hasattr(found, "commands"):
        verbs.append(arguments.pop(0))
        found = found.commands[verbs[-1]]
    found.make_context(" ".join(verbs), arguments)
    return verbs


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_page_is_one(command: str) -> None:
    assert parse(command)


def test_page_shows_every_verb_of_submit() -> None:
    verbs = [parse(command) for command in COMMANDS]
    group = typer.main.get_command(app).commands["submit"]  # type: ignore[attr-defined]  # it is a group
    assert {verb[1] for verb in verbs if verb[0] == "submit"} == set(group.commands)


def test_settings_of_the_page_are_settings() -> None:
    values = yaml.safe_load(BLOCKS["capture.yaml"])
    least = {"store": "s", "corpus": {"files": ["x"]}, "teacher": {"model": "m"}}
    settings = build_settings(ClusterCaptureSettings, {**least, **values}, where="page")
    assert (settings.unit_bytes, settings.actors.gpus) == (2_000_000, 1)


def test_runtime_environment_of_the_page_is_one(tmp_path: Path) -> None:
    path = tmp_path / "runtime.yaml"
    path.write_text(BLOCKS["runtime.yaml"])
    assert set(RuntimeEnv(**read_runtime_env(str(path)))) >= {"pip", "env_vars", "config"}


def test_variable_of_the_page_is_the_one_that_is_set() -> None:
    assert STOP_SECONDS_VARIABLE in PAGE
