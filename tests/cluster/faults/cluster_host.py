"""A Ray cluster of several machines on this one, in a process of its own that does what it is told on stdin.

In a process of its own because Ray reads its token once per process, and tests of one process have several.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Of a machine that does not answer: told dead after some 10 seconds, where Ray by itself takes a minute.
_HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
_MEMORY_BYTES = 80 * 2**20


class HostedCluster:
    """A cluster whose head runs nothing; machines are known by the ids that Ray gives them."""

    def __init__(self, environment: dict[str, str], temporary: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(temporary)],
            env={**environment, **_HEALTH},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address: str = self._read()["address"]
        self._raylets: dict[str, int] = {}

    def add(self, **resources: float) -> str:
        """Let a machine join; its id."""
        answer = self._ask("add", resources)
        self._raylets[answer["node"]] = answer["raylet"]
        return str(answer["node"])

    def remove(self, node: str) -> None:
        """Take a machine away at once, with all its processes."""
        self._ask("remove", node)
        del self._raylets[node]

    def find_raylet(self, node: str) -> int:
        """Process id of what speaks for a machine."""
        return self._raylets[node]

    @property
    def nodes(self) -> list[str]:
        return list(self._raylets)

    def close(self) -> None:
        """End everything."""
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(60)

    def _ask(self, verb: str, argument: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([verb, argument]) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the process of the cluster ended with {self._process.wait(60)}"
        answer: dict[str, Any] = json.loads(line)
        return answer


def main(temporary: str) -> None:
    """Do what comes in, one JSON array a line, and answer each with an object."""
    import ray
    from ray.cluster_utils import Cluster

    # A cluster writes down, for the whole machine, that it is the one to connect to, and takes that back in the end.
    ray._private.utils.write_ray_address = ray._common.utils.reset_ray_address = lambda *_, **__: None
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever Ray prints

    def answer(**facts: Any) -> None:
        answers.write(json.dumps(facts) + "\n")
        answers.flush()

    head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": temporary, "object_store_memory": _MEMORY_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    answer(address=cluster.address)
    nodes: dict[str, Any] = {}
    for line in sys.stdin:
        verb, argument = json.loads(line)
        if verb == "add":
            node = cluster.add_node(**{"object_store_memory": _MEMORY_BYTES, **argument})
            nodes[node.node_id] = node
            [raylet] = node.all_processes["raylet"]
            answer(node=node.node_id, raylet=raylet.process.pid)
        else:
            cluster.remove_node(nodes.pop(argument), allow_graceful=False)
            answer()
    with contextlib.suppress(Exception):
        cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
