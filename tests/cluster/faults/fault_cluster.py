"""A cluster for captures under faults: machines, processes, and what is planned to go wrong."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from capture_processes import Processes, wait_until

from tests.cluster.faults.cluster_host import HostedCluster
from tests.cluster.faults.fault_captures import FaultCapture
from tests.cluster.faults.hooks.planned_faults import FOLDER, FaultFolder

HOOKS = Path(__file__).parent / "hooks"
ACTOR = "ray::CaptureActor"


class FaultCluster:
    """Machines that captures run on, in processes that are found and killed by their mark.

    Attributes:
        machines: the cluster.
        processes: of the cluster and of captures.
        faults: that strike in capture actors.
    """

    def __init__(self, folder: Path, temporary: Path) -> None:
        self.processes = Processes(folder)
        self.faults = FaultFolder(folder / "faults")
        self.faults.plan()
        environment = self.processes.environment
        environment["PYTHONPATH"] = os.pathsep.join([str(HOOKS), environment["PYTHONPATH"]])
        environment[FOLDER] = str(self.faults.folder)
        self._run = 0
        try:
            self.machines = HostedCluster(environment, temporary)
        except BaseException:
            self.processes.kill_all()
            raise

    def prepare(self, num_machines: int) -> None:
        """The cluster as a test finds it: so many machines, nobody at work on them, nothing planned."""
        self.check_nobody_works()
        self.faults.plan()
        while len(self.machines.nodes) < num_machines:
            self.machines.add(num_cpus=1)
        for node in self.machines.nodes[num_machines:]:
            self.machines.remove(node)

    def start(self, capture: FaultCapture, *arguments: str, log: Path | None = None) -> subprocess.Popen[str]:
        """Start the driver of a capture on the cluster."""
        self._run += 1
        address = ("--address", self.machines.address)
        return self.processes.start(capture.settings, *address, *arguments, run=f"-driver-{self._run}", log=log)

    def find_actors(self) -> list[int]:
        return self.processes.find(ACTOR)

    def check_nobody_works(self) -> None:
        """No actor outlives its capture."""
        wait_until(lambda: not self.find_actors(), "all actors to end")

    def stop(self, node: str) -> None:
        """Let a machine be silent, with whatever runs on it going on: as if its network was cut."""
        os.kill(self.machines.find_raylet(node), signal.SIGSTOP)

    def close(self) -> None:
        """End everything, and see to it that it has ended."""
        try:
            self.machines.close()
            wait_until(lambda: not self.processes.find(), "the cluster's processes to end")
        finally:
            self.processes.kill_all()
