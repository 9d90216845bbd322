"""Readers of streams in processes of their own: this project's, and other projects' in their own environment."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitstore.errors import OutsideError

PEERS = ("streaming", "litdata")
_SCRIPT = Path(__file__).with_name("stream_peer.py")
_LINES_OF_AN_ERROR = 15


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One pass over all records: what came, and what it cost."""

    records: int
    token_sum: int
    first_seconds: float
    seconds: float
    processor_seconds: float
    scratch_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Repetitions of one measurement."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def format(self, digits: int = 0) -> str:
        """The median with half the spread: `1,512 ±4%`."""
        half = 50 * (max(self.values) - min(self.values)) / self.median
        return f"{self.median:,.{digits}f} ±{half:.0f}%"


def run_step(step: str, **task: Any) -> Any:
    """What a step of `tools.benchmark.stream_steps` measures in a fresh process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return _run([sys.executable, "-m", "tools.benchmark.stream_steps", step], task, environment, step)


def run_peer(python: Path, peer: str, action: str, **task: Any) -> Any:
    """What `stream_peer.py` answers in a fresh process of another environment."""
    left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    return _run([str(python), str(_SCRIPT), peer, action], task, environment, f"{peer}, {action}")


def _run(command: Sequence[str], task: dict[str, Any], environment: dict[str, str], what: str) -> Any:
    done = subprocess.run(command, input=json.dumps(task), env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        end = "\n".join(done.stderr.strip().splitlines()[-_LINES_OF_AN_ERROR:])
        raise OutsideError(f"{what}: expected an answer of {command[0]}, found exit code {done.returncode}:\n{end}")
    return json.loads(lines[-1])


def copy_linked(source: Path, target: Path) -> Path:
    """The files of a folder in a new one, without a byte being copied: what a reader adds or deletes stays there."""
    shutil.copytree(source, target, copy_function=os.link)
    return target


def measure_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
