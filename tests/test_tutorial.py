"""docs/tutorial.md from its first line to its last, as somebody runs it who has nothing yet; and its recording."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checkout import ROOT

from tools import recording
from tools.quickstart import TEACHER

PAGE = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tutorial_runs_to_its_end(tmp_path: Path) -> None:
    recording.prepare(tmp_path)
    printed = {command: recording.run(command, tmp_path) for command in recording.read_commands()}
    assert str(TEACHER) in printed['python -c "from tools.quickstart import TEACHER; print(TEACHER)"']
    assert "committed" in printed["logitstore status store"]
    assert "The store is what it says it is." in printed["logitstore verify store"]
    assert "that were searched" in printed["logitstore inspect store --record 0 --min-surprise 6"]
    by_label = next(command for command in printed if "GROUP BY label" in command)
    assert {"json", "logging"} <= set(printed[by_label].split())
    assert "top-k, k = 8" in printed["logitstore diff store store-of-8 --top 3"]
    assert (tmp_path / "student/student/model.safetensors").exists()
    evaluated = next(command for command in printed if command.startswith("logitstore evaluate"))
    assert "student/student on store, manifest 1" in printed[evaluated]


def test_recording_has_every_command_of_the_tutorial_and_what_it_printed() -> None:
    page = (ROOT / "docs/session.md").read_text(encoding="utf-8")
    [session] = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    commands = re.findall(r"^\$ (.*)\n(?!\n|\$ )", session, re.MULTILINE)
    assert commands == recording.read_commands(), "record it again: python -m tools.recording > docs/session.md"
    assert all(line.startswith("$ ") for line in re.findall(r"```console\n(.*?)\n", PAGE))
