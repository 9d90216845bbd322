"""The files of this checkout, for the tests that look at the project as a whole."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("logitstore", "trainer", "cluster", "tools")


def list_files() -> list[Path]:
    """Every file that is or would be committed, in path order."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    paths = (ROOT / name for name in sorted(set(listed.stdout.split("\0")) - {""}))
    return [path for path in paths if path.is_file()]


def list_modules() -> list[Path]:
    """Every Python file of the four packages."""
    return [path for path in list_files() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in PACKAGES]
