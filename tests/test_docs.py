"""What README says must be true: its settings load, its Python runs, its commands exist."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from checkout import ROOT
from typer.testing import CliRunner

from cluster.settings import ClusterCaptureSettings
from logitstore.settings import build_settings
from tools.cli import app
from trainer.config import TrainSettings

README = (ROOT / "README.md").read_text(encoding="utf-8")


def read_settings_block(name: str) -> object:
    """The YAML that stands under a comment with its file name."""
    match = re.search(rf"(?:^    .*\n|^\n)*?^    # {name}\n((?:    .*\n)+)", README, re.MULTILINE)
    assert match, name
    return yaml.safe_load(textwrap.dedent(match[1]))


def test_readme_capture_settings_are_valid() -> None:
    settings = build_settings(ClusterCaptureSettings, read_settings_block("capture.yaml"), where="README")
    assert settings.method.k == 64


def test_readme_train_settings_are_valid() -> None:
    settings = build_settings(TrainSettings, read_settings_block("train.yaml"), where="README")
    assert settings.loss.weight == 0.8


def test_readme_python_runs_on_a_store(small_store_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(code.replace("runs/quickstart/store", small_store_url), {})
    assert capsys.readouterr().out.startswith("60 0/0 corpus.jsonl@")


def test_readme_commands_exist_and_have_their_options() -> None:
    lines = re.findall(r"^\| `logitstore (\w+) ([^`]*)`", README, re.MULTILINE)
    assert {verb for verb, _ in lines} >= {"plan", "capture", "status", "verify", "inspect", "train", "evaluate"}
    for verb, arguments in lines:
        result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert result.exit_code == 0, verb
        for option in re.findall(r"--[a-z-]+", arguments):
            assert option in result.output, (verb, option)


def test_readme_names_every_folder_and_every_link_is_there() -> None:
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    for folder in ("logitstore", "trainer", "cluster", "tools", "tests"):
        assert f"| `{folder}/` |" in README


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for path in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / path).exists(), path


def list_command_lines() -> list[tuple[str, str]]:
    """Page and line of every `logitstore …` in a block of code, of README, the pages and the commands' own examples."""
    found = []
    for page in [ROOT / "README.md", ROOT / "BENCHMARKS.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        text = re.sub(r'"[^"\n]*\n[^"\n]*"', lambda quoted: quoted[0].replace("\n", " "), text)
        fenced = "\n".join(re.findall(r"^```(?:sh|console|bash|text|)\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
        indented = re.findall(r"^    (?:until )?(logitstore .*)$", text, re.MULTILINE)
        for line in [*indented, *re.findall(r"^(?:\$ )?(logitstore .*)$", fenced, re.MULTILINE)]:
            found.append((page.name, re.split(r"\s+#|; ", line)[0]))
    return sorted({(page, line) for page, line in found if not re.search(r"[…|\[{]|^logitstore -", line)})


def test_pages_have_many_command_lines() -> None:
    assert len(list_command_lines()) > 100


@pytest.mark.parametrize(("page", "line"), list_command_lines())
def test_command_line_of_a_page_is_one_that_is_understood(page: str, line: str) -> None:
    command: Any = typer.main.get_command(app)
    words = shlex.split(line)[1:]
    context = command.context_class(command)
    while hasattr(command, "commands"):
        assert words, f"{page}: {line}: expected a verb"
        assert words[0] in command.commands, f"{page}: {line}: {words[0]!r} is no verb"
        command = command.commands[words.pop(0)]
        context = command.context_class(command, parent=context)
    values, rest, _ = command.make_parser(context).parse_args(words)
    assert rest == [], f"{page}: {line}"
    missing = [each.name for each in command.params if each.required and values.get(each.name) in (None, ())]
    assert missing == [], f"{page}: {line}"


def test_methods_on_their_page_are_valid() -> None:
    page = (ROOT / "docs" / "capture-methods.md").read_text(encoding="utf-8")
    methods = [yaml.safe_load(line) for line in re.findall(r"^(?:# )?(method: .*)$", page, re.MULTILINE)]
    assert {one["method"]["kind"] for one in methods} == {"top_k", "head_tail", "sample"}
    for one in methods:
        values = {"store": "store", "corpus": {"files": ["a.jsonl"]}, "teacher": {"model": "m"}, **one}
        build_settings(ClusterCaptureSettings, values, where="page")
