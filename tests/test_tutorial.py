"""docs/tutorial.md from its first line to its last, as somebody runs it who has nothing yet."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

from tools.quickstart import TEACHER

PAGE = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
PROGRAM = [sys.executable, "-c", "from tools.cli import main; main()"]


def run(command: str, folder: Path) -> str:
    """What a line of the page prints."""
    program, *arguments = shlex.split(command.removeprefix("$ "))
    words = PROGRAM if program == "logitstore" else [sys.executable]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    done = subprocess.run([*words, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tutorial_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code, {})
    for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL):
        name = block.partition("\n")[0].removeprefix("# ")
        (tmp_path / name).write_text(block.replace("MODEL", str(TEACHER)), encoding="utf-8")
    assert all(command.startswith("$ ") for command in COMMANDS)
    printed = {command.removeprefix("$ logitstore "): run(command, tmp_path) for command in COMMANDS}
    assert str(TEACHER) in printed['$ python -c "from tools.quickstart import TEACHER; print(TEACHER)"']
    assert "committed" in printed["status store"]
    assert "The store is what it says it is." in printed["verify store"]
    assert "that were searched" in printed["inspect store --record 0 --min-surprise 6"]
    assert {"json", "logging"} <= set(
        printed[next(command for command in printed if "GROUP BY label" in command)].split()
    )
    assert "top-k, k = 8" in printed["diff store store-of-8 --top 3"]
    assert (tmp_path / "student/student/model.safetensors").exists()
    assert (
        "student/student on store, manifest 1"
        in printed[next(command for command in printed if command.startswith("evaluate"))]
    )
