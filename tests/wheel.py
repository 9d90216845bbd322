"""Builds the wheel of this checkout, as a release would."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.checkout import ROOT, list_files


def build_wheel(folder: Path) -> Path:
    """Build from a copy of the committed files below `folder`, so that no earlier build can leave its traces."""
    source = folder / "source"
    for path in list_files():
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist"), str(source)])
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def run(command: list[str], cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Standard output of a command that has to succeed; what it said on both streams is the failure otherwise."""
    result = subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode == 0, f"{command} ended with {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout
