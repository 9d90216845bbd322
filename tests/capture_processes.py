"""Captures in processes of their own, for tests that kill them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from checkout import ROOT

# Another job may hog the machine: a Ray that starts in 10 seconds has been seen to take minutes.
PATIENCE_SECONDS = 250.0
MARK = "LOGITSTORE_TEST_RUN"


class Processes:
    """Captures in processes of their own, and whatever these start: found by a mark in their environment."""

    def __init__(self, folder: Path) -> None:
        self._mark = uuid.uuid4().hex
        self.environment = {
            **os.environ,
            MARK: self._mark,
            "HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "ray-token"),
        }
        (folder / "ray-token").write_text(uuid.uuid4().hex)

    def start(
        self, settings: Path, *arguments: str, run: str = "", log: Path | None = None, has_terminal: bool = False
    ) -> subprocess.Popen[str]:
        """Start a capture; `run` names it and all processes that it starts. What it logs goes to a file, or a pipe.

        With `has_terminal` it leads a process group, to which Ctrl-C can be sent as a terminal does.
        """
        command = [sys.executable, "-c", "from tools.cli import main; main()", "capture", str(settings), "--json"]
        with contextlib.ExitStack() as stack:
            return subprocess.Popen(
                [*command, *arguments],
                env={**self.environment, MARK: self._mark + run},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if log is None else stack.enter_context(log.open("a")),
                text=True,
                start_new_session=has_terminal,
            )

    def find(self, name: str = "", *, run: str = "") -> list[int]:
        """Ids of living processes of ours, or of one run, whose command line holds a name."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                is_ours = f"{MARK}={self._mark}{run}".encode() in (folder / "environ").read_bytes()
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if is_ours and command and name in command:
                found.append(int(folder.name))
        return found

    def kill_all(self) -> None:
        for process in self.find():
            os.kill(process, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.02)  # polls other processes; nothing is timed by it
