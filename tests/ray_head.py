"""A Ray head with its job API, token authentication on: as `ray start --head` makes it, below a folder of its own."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from capture_processes import MARK, wait_until
from checkout import ROOT

_PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "ray-client-server-port",
)
# Above the ports of Ray's workers, below those that kernels give to clients.
_FIRST_PORT, _LAST_PORT = 20_000, 32_000


class RayHead:
    """Starts a head, kills it, starts another; one at a time.

    Attributes:
        folder: of everything that the heads write.
        address: of the job API of the one that runs.
    """

    def __init__(self, **environment: str) -> None:
        # Paths of sockets below it may have 107 characters: pytest's own folders are too long.
        self.folder = Path(tempfile.mkdtemp(prefix="lsh-", dir="/tmp"))
        self.address = ""
        self._token = uuid.uuid4().hex
        self._mark = uuid.uuid4().hex
        self._number = 0
        self._process: subprocess.Popen[bytes] | None = None
        (self.folder / "token").write_text(self._token)
        programs = str(Path(sys.executable).parent)
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON"))},
            **environment,
            MARK: self._mark,
            "HOME": str(self.folder),
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
        }

    def ensure(self) -> None:
        """Start a head, if none runs."""
        if self.find():
            return
        self._number += 1
        ports = dict(zip(_PORTS, _find_free_ports(len(_PORTS)), strict=True))
        self.address = f"http://127.0.0.1:{ports['dashboard-port']}"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        command += [f"--{name}={port}" for name, port in ports.items()]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=2"]
        command += ["--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"]
        log = self.folder / f"head-{self._number}.log"
        with log.open("w") as file:
            self._process = process = subprocess.Popen(
                [*command, f"--temp-dir={self.folder / str(self._number)}"],
                env=self._environment,
                cwd=self.folder,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        agent = ports["dashboard-agent-listen-port"]
        wait_until(lambda: process.poll() is not None or (self._answers() and _listens(agent)), f"a head; see {log}")
        assert process.poll() is None, log.read_text()

    def kill(self) -> None:
        """Kill a head and whatever it has started, as the loss of its machine does, and wait until nothing is left."""
        while found := self.find():
            for process in found:
                os.kill(process, signal.SIGKILL)
            wait_until(lambda: not any(map(_lives, found)), "the head to end", 60.0)
        if self._process is not None:
            self._process.wait()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder)

    def find(self) -> list[int]:
        """Ids of the living processes of heads and of their jobs."""
        mark = f"{MARK}={self._mark}".encode()
        return [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if mark in _read(folder / "environ")]

    def run(self, *arguments: str, exit_code: int = 0, **environment: str) -> tuple[str, str]:
        """What `logitstore submit` leaves on stdout and stderr."""
        process = self.start(*arguments, **environment)
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == exit_code, stderr
        return stdout, stderr

    def start(self, verb: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start `logitstore submit`, in a process that is no part of the head."""
        command = [sys.executable, "-m", "tools.submit", verb, "--address", self.address, *arguments]
        own = {name: value for name, value in self._environment.items() if name != MARK}
        return subprocess.Popen(
            command,
            env={**own, **environment},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ask(self, path: str) -> Any:
        """What the head answers to a client that has the token."""
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {self._token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def _answers(self) -> bool:
        try:
            self.ask("/api/jobs/")
        except (urllib.error.URLError, OSError, ValueError):
            return False
        return True


def _find_free_ports(count: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < count:
        port = random.SystemRandom().randrange(_FIRST_PORT, _LAST_PORT)
        if not _listens(port):
            ports.add(port)
    return list(ports)


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _lives(process: int) -> bool:
    return bool(_read(Path(f"/proc/{process}/cmdline")))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
