"""The capture of kuberay-capture.yaml on Ray's own autoscaler, whose machines are made up: from no worker to none.

`pytest -m soak tests/cluster/deploy`: a minute, on a machine with nothing else to do.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from capture_processes import Processes, wait_until
from tiny_models import save_model

from tests.cluster.deploy.deployment_files import Document, read_cluster_spec, read_document

CAPTURE = "kuberay-capture.yaml"
NUM_ACTORS = 2
NUM_UNITS = 20
PATIENCE_SECONDS = 240.0
# What the made-up provider of machines takes the head for.
HEAD_ID = "f" * 51 + "00000"
NOT_ASKED_FOR = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")


@pytest.fixture
def processes(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Processes]:
    if "soak" not in request.config.option.markexpr:
        pytest.skip("takes a minute: pytest -m soak")
    processes = Processes(tmp_path)
    yield processes
    processes.kill_all()


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder with a short path: those of sockets have at most 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="lz-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def build_autoscaling(port: int) -> Document:
    """What the launcher would be told of a cluster like the file's, idle machines going after six seconds."""
    cluster = read_cluster_spec(CAPTURE)
    [group] = cluster["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    worker = {
        "resources": {"CPU": int(limits["cpu"]), "GPU": int(limits["nvidia.com/gpu"])},
        "labels": group["labels"],
        "min_workers": group["minReplicas"],
        "max_workers": group["maxReplicas"],
        "node_config": {},
    }
    head = {"resources": {"CPU": int(cluster["headGroupSpec"]["rayStartParams"]["num-cpus"])}, "node_config": {}}
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "head_node_id": HEAD_ID,
        "gcs_address": f"127.0.0.1:{port}",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
    }
    return {
        "cluster_name": "from-zero",
        "provider": provider,
        "max_workers": group["maxReplicas"],
        "available_node_types": {"ray.head.default": {**head, "max_workers": 0}, group["groupName"]: worker},
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        **{f"{name}_commands": [] for name in NOT_ASKED_FOR},
    }


def find_free_ports(count: int) -> list[int]:
    """Ports that the kernel has to give, which lie above those of Ray's workers."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def head(processes: Processes, temporary: Path) -> Iterator[str]:
    """The address of a head without CPUs and with an autoscaler."""
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "metrics-export-port", "ray-client-server-port")
    ports = dict(zip(names, find_free_ports(len(names)), strict=True))
    (temporary / "autoscaling.json").write_text(json.dumps(build_autoscaling(ports["port"])))
    processes.environment |= {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    command += [f"--temp-dir={temporary}", f"--autoscaling-config={temporary / 'autoscaling.json'}", "--num-cpus=0"]
    command += ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
    with (temporary / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=processes.environment, stdout=log, stderr=log)
    try:
        wait_until(lambda: count_machines(processes) == 1, "a head", PATIENCE_SECONDS)
        yield f"127.0.0.1:{ports['port']}"
    finally:
        processes.kill_all()
        process.wait()


def count_machines(processes: Processes) -> int:
    return len(processes.find("raylet/raylet "))


def build_arguments(folder: Path) -> tuple[Path, list[str]]:
    """The settings of the file, and what replaces them here: places, a small teacher, the number of actors."""
    settings, corpus = folder / "capture.yaml", folder / "corpus.jsonl"
    settings.write_text(read_document(CAPTURE, "ConfigMap")["data"]["capture.yaml"])
    texts = [f"value_{number} = read({number})\n" * 200 for number in range(60)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return settings, [
        f"store={folder / 'store'}",
        f"corpus={{files: [{corpus}]}}",
        f"teacher={{model: {save_model('llama', folder / 'teacher')}}}",
        "method.k=8",
        "sequences={length: 64}",
        f"unit_bytes={corpus.stat().st_size // NUM_UNITS}",
        f"actors.count={NUM_ACTORS}",
    ]


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_capture_of_the_job_grows_its_cluster_from_no_worker_and_leaves_none(
    processes: Processes, head: str, tmp_path: Path
) -> None:
    settings, overrides = build_arguments(tmp_path)
    capture = processes.start(settings, *overrides, "--address", head, log=tmp_path / "capture.log")
    wait_until(lambda: count_machines(processes) == 1 + NUM_ACTORS, "the workers", PATIENCE_SECONDS)
    stdout, _ = capture.communicate(timeout=PATIENCE_SECONDS)
    assert capture.returncode == 0, (tmp_path / "capture.log").read_text()
    assert json.loads(stdout)["store"]["units_committed"] >= NUM_UNITS
    wait_until(lambda: count_machines(processes) == 1, "the workers to go", PATIENCE_SECONDS)
