"""A Ray of several nodes on this machine for tests of training, and what becomes of its processes."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from checkout import ROOT
from ray.cluster_utils import Cluster

MARK = "LOGITSTORE_TRAINING_TEST"
PATIENCE_SECONDS = 200.0


@dataclass(frozen=True, kw_only=True)
class TrainingCluster:
    """A head without CPUs for others' processes, and nodes that come and go.

    Attributes:
        cluster: of Ray.
        mark: in the environment of every process of it.
        folder: of its sessions, with the logs of its processes.
    """

    cluster: Cluster
    mark: str
    folder: Path

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    @contextlib.contextmanager
    def nodes(self, *cpus: int) -> Iterator[list[Any]]:
        """Nodes with CPUs, gone when the block ends."""
        nodes = [self.cluster.add_node(num_cpus=number, wait=False) for number in cpus]
        try:
            self.cluster.wait_for_nodes()
            yield nodes
        finally:
            for node in nodes:
                if node in self.cluster.worker_nodes:
                    self.cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, seconds: float) -> None:
        """Tell Ray that a node will be taken away."""
        client = ray._raylet.GcsClient(address=self.address)
        deadline_ms = int((time.time() + seconds) * 1000)
        is_accepted, why_not = client.drain_node(node.node_id, 2, "preempted", deadline_ms)
        assert is_accepted, why_not

    def find_node(self, process: int, nodes: list[Any]) -> Any:
        """The one of these nodes that a process of the cluster runs on."""
        parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        [node] = [node for node in nodes if node.all_processes["raylet"][0].process.pid == parent]
        return node

    def find(self, name: str = "") -> list[int]:
        """Ids of living processes of the cluster whose command line holds a name."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                is_ours = f"{MARK}={self.mark}\0".encode() in (folder / "environ").read_bytes()
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if is_ours and command and name in command and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        return found


@contextlib.contextmanager
def run_training_cluster(folder: Path) -> Iterator[TrainingCluster]:
    """Start a head; everything ends with the block, and none of its processes is left."""
    mark = uuid.uuid4().hex
    environment = {
        MARK: mark,
        "HOME": str(folder),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with contextlib.ExitStack() as stack:
        # A short name: those of sockets in it have room for little more.
        sessions = stack.enter_context(tempfile.TemporaryDirectory(prefix="rt-", dir="/tmp"))
        stack.callback(ray._raylet.Config.initialize, "")  # reads the environment, once for a process
        stack.enter_context(mock.patch.dict(os.environ, environment))
        ray._raylet.Config.initialize("")
        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": sessions}
        cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=True)
        running = TrainingCluster(cluster=cluster, mark=mark, folder=Path(sessions))
        try:
            yield running
        finally:
            cluster.shutdown()
        wait_until(lambda: not running.find("ray"), "all processes of the cluster to end")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)  # polls other processes; nothing is timed by it
