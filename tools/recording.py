"""docs/session.md: what the commands of docs/tutorial.md print, recorded.

`python -m tools.recording` runs the tutorial from its first line to its last in a folder of its own, a minute or
two, and prints the page. Needs the extra `quickstart`, and a checkout.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tools.quickstart import TEACHER

ROOT = Path(__file__).parents[1]
_PAGE = ROOT / "docs/tutorial.md"
_HEAD = """# A session

What the commands of [the tutorial](tutorial.md) print, on two CPU cores, nothing left out: `python -m tools.recording >
docs/session.md` runs them and writes this page. On a terminal there is colour too: in `inspect --record` the teacher's
entropy has one.
"""


def read_commands() -> list[str]:
    """The tutorial's command lines, in order."""
    blocks = re.findall(r"```console\n(.*?)```", _PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]


def prepare(folder: Path) -> None:
    """Write the tutorial's corpus and settings, its teacher being the one that is shipped."""
    page = _PAGE.read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        name = block.partition("\n")[0].removeprefix("# ")
        (folder / name).write_text(block.replace("MODEL", str(TEACHER)), encoding="utf-8")


def run(command: str, folder: Path) -> str:
    """What a command prints, on either stream.

    Raises:
        RuntimeError: it failed; with what it printed.
    """
    program, *arguments = shlex.split(command)
    own = [sys.executable, "-c", "from tools.cli import main; main()"]
    words = own if program == "logitstore" else [sys.executable]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "110"}
    done = subprocess.run(
        [*words, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command}: expected exit code 0, found {done.returncode}:\n{done.stdout}")
    return done.stdout


def record() -> Iterator[tuple[str, str]]:
    """Each command of the tutorial with what it prints, run in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="logitstore-tutorial-") as folder:
        prepare(Path(folder))
        for command in read_commands():
            printed = run(command, Path(folder))
            yield command, printed.replace(folder, "~/my").replace(str(ROOT), "~/logitstore")


def main() -> None:
    """Print the page."""
    print(_HEAD)
    print("```console")
    for number, (command, printed) in enumerate(record()):
        print(*([""] if number else []), f"$ {command}", *(line.rstrip() for line in printed.splitlines()), sep="\n")
    print("```")


if __name__ == "__main__":
    main()
