"""A capture on a real Ray, looked at as Prometheus does: through the metrics port."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from capture_processes import PATIENCE_SECONDS, wait_until
from checkout import ROOT
from tiny_models import save_model

from cluster.metrics import METRICS
from logitstore.store.commit import COMMITS, list_units
from logitstore.store.files import StoreFiles

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NUM_DOCUMENTS = 60
# Runs a capture on a Ray of its own whose metrics port is known, and stays until its standard input is closed.
CAPTURE = """
import sys
import ray

port, folder, settings = sys.argv[1:]
ray.init(
    address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _metrics_export_port=int(port),
    _temp_dir=folder,
)
from tools.cli import app

app(["capture", settings, "--json"], standalone_mode=False)
print("captured", flush=True)
sys.stdin.read()
ray.shutdown()
"""


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    documents = [{"text": f"value_{i} = read({i})\n" * 200} for i in range(NUM_DOCUMENTS)]
    documents[3] = {"text": ""}
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    values = {
        "store": str(tmp_path / "store"),
        "corpus": {"files": [str(tmp_path / "corpus.jsonl")]},
        "teacher": {"model": str(save_model("llama", tmp_path / "teacher")), "device": "cpu"},
        "method": {"k": 8},
        "sequences": {"length": 64},
        "unit_bytes": (tmp_path / "corpus.jsonl").stat().st_size // 20,
        "actors": {"count": 1, "cpus": 1},
    }
    (tmp_path / "capture.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "capture.yaml"


def find_free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Port:
    """The metrics of a Ray, as text and as values."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"

    def read(self) -> str:
        """What Prometheus is given; nothing while nobody listens yet."""
        try:
            with urllib.request.urlopen(self._url, timeout=10) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""

    def read_values(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        """Labels and value of each of our samples, by name."""
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        for name, labels, value in re.findall(r"^(ray_logitstore_\w+)\{(.*)\} (\S+)$", self.read(), re.MULTILINE):
            parsed = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            found.setdefault(name, []).append((parsed, float(value)))
        return found

    def sum(self, name: str, **labels: str) -> float | None:
        """Sum over the samples of a name that have these labels; None where there is none."""
        samples = [value for found, value in self.read_values().get(name, []) if labels.items() <= found.items()]
        return sum(samples) if samples else None


@pytest.fixture
def capture(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Port]]:
    """A capture in a process of its own, and its metrics."""
    port = find_free_port()
    folder = settings.parent
    (folder / "token").write_text("0123456789abcdef")
    environment = {
        **os.environ,
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_metrics_report_interval_ms": "1000",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    # Ray's sockets lie below its folder, and their paths may not be long.
    ray_folder = tmp_path_factory.mktemp("ray")
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", CAPTURE, str(port), str(ray_folder), str(settings)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    yield process, Port(port)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, (folder / "errors").read_text()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    wait_until(lambda: condition() or process.poll() is not None, what)
    assert process.poll() is None, what


def test_figures_of_a_capture_are_on_the_metrics_port(
    capture: tuple[subprocess.Popen[str], Port], settings: Path
) -> None:
    process, port = capture
    store = str(settings.parent / "store")
    wait_for(lambda: bool(port.sum("ray_logitstore_units_total", store=store)), process, "an actor's units")
    assert process.stdout is not None
    while process.stdout.readline() != "captured\n":
        assert process.poll() is None
    num_units = len(list_units(StoreFiles(store), COMMITS))
    wait_for(lambda: port.sum("ray_logitstore_units_done", store=store) == num_units, process, "the last figures")
    # Ray passes on each process's figures at its own time.
    wait_for(lambda: port.sum("ray_logitstore_actors_ready") == 0, process, "the end of the actors")

    assert port.sum("ray_logitstore_units_planned") == num_units
    assert port.sum("ray_logitstore_documents_total") == NUM_DOCUMENTS
    assert port.sum("ray_logitstore_dead_letters_total", reason="empty", store=store) == 1
    assert port.sum("ray_logitstore_unit_seconds_count") == num_units
    assert port.sum("ray_logitstore_unit_seconds_bucket", le="+Inf") == num_units
    assert (port.sum("ray_logitstore_actors_ready"), port.sum("ray_logitstore_units_in_flight")) == (0, 0)

    values = port.read_values()
    assert values.keys() <= {name for metric in METRICS for name in metric.exported_names}
    # What there was none of has not been counted; Ray's own labels come beside ours.
    missing = {metric.name for metric in METRICS if not set(metric.exported_names) <= values.keys()}
    never = {"failures", "actor_losses", "actor_hangs", "lost_races"}
    assert missing == {f"logitstore_{name}" for name in never}
    for metric in METRICS:
        for name in metric.exported_names:
            for labels, _ in values.get(name, []):
                assert set(metric.labels) <= labels.keys()
