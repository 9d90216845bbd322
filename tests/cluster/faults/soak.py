"""A capture after another on a cluster on which things go wrong at random, for as long as one likes.

What goes wrong, when and to whom is drawn from a seed; what the processes are at just then is not. Every capture goes
on until all of its units are committed, by as many drivers as that takes, and is checked as a whole before the next.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from fault_proxy import FaultProxy, Rule
from s3_server import BUCKET
from tiny_models import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cluster.faults.fault_captures import MARKER, FaultCapture, check_whole, make_capture
from tests.cluster.faults.fault_cluster import FaultCluster
from tests.cluster.faults.hooks.planned_faults import Fault, Place
from tests.cluster.faults.soak_report import SoakReport

Item = TypeVar("Item")
DONE, SET_ASIDE, OUTSIDE = 0, 3, 4
_PLACES: tuple[Place, ...] = ("scored", "stored", "committed")
_SECONDS_WITHOUT_A_COMMIT = 400.0


class Soak:
    """Runs captures and lets things go wrong.

    Args:
        cluster: with some machines.
        proxy: between the captures and their storage.
        folder: for settings and corpora.
        seed: of what goes wrong.
        num_units: of a capture.
        pause: fewest and most seconds between two faults.
        outages: seconds for which the storage refuses everything; one of these.
        logs: folder for what the drivers log; that of everything else by default.
    """

    def __init__(
        self,
        cluster: FaultCluster,
        proxy: FaultProxy,
        folder: Path,
        *,
        seed: int,
        num_units: int = 60,
        pause: tuple[float, float] = (4.0, 12.0),
        outages: tuple[float, ...] = (5, 20, 60),
        logs: Path | None = None,
    ) -> None:
        self._cluster, self._proxy, self._folder = cluster, proxy, folder
        self._num_units, self._pause, self._outages = num_units, pause, outages
        self._random = random.Random(seed)
        self._drivers: list[subprocess.Popen[str]] = []
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._num_machines = len(cluster.machines.nodes)
        self._logs = (logs or folder) / "drivers.log"
        self._logs.parent.mkdir(parents=True, exist_ok=True)
        self._teacher = save_poisoned_teacher(folder / "teacher")
        self.report = SoakReport(seed=seed)

    def run(self, minutes: float = 0.0, *, min_units: int = 0, min_faults: int = 0) -> SoakReport:
        """Let things go wrong for some minutes, and so many units and faults as are asked for at least."""
        started = time.monotonic()
        self._started = started

        def has_time() -> bool:
            is_short = self.report.units + self._num_units < min_units or len(self.report.log) < min_faults
            return is_short or time.monotonic() - started < 60 * minutes

        while has_time():
            self._capture(self._make_capture(), has_time)
        self.report.seconds = time.monotonic() - started
        return self.report

    def _make_capture(self) -> FaultCapture:
        number = self.report.captures
        folder = self._folder / str(number)
        folder.mkdir()
        server = self._proxy.server
        num_documents = 4 * self._num_units
        return make_capture(
            folder,
            num_documents=num_documents,
            num_units=self._num_units,
            repeats=120,
            marked=frozenset(self._random.sample(range(num_documents), num_documents // 60)),
            url=f"s3://{BUCKET}/soak-{os.getpid()}-{self.report.seed}-{number}",
            storage_options={"endpoint_url": self._proxy.endpoint_url, "key": server.key, "secret": server.secret},
            teacher_folder=self._teacher,
            actors={"count": self._num_machines, "cpus": 1},
            heartbeat_seconds=5,
        )

    def _capture(self, capture: FaultCapture, has_time: Callable[[], bool]) -> None:
        """One capture, from its first driver to its last, and the check of what there is then."""
        self._cluster.faults.plan()
        self._start(capture)
        next_fault = time.monotonic() + self._random.uniform(*self._pause)
        last_commit, num_commits = time.monotonic(), 0
        while not self._collect_drivers(capture):
            now = time.monotonic()
            for due, action in [item for item in self._later if item[0] <= now]:
                self._later.remove((due, action))
                action()
            if has_time() and now >= next_fault:
                next_fault = now + self._random.uniform(*self._pause)
                self._break_something(capture)
            found = len(self._cluster.faults.read_events("won"))
            last_commit, num_commits = (now, found) if found > num_commits else (last_commit, num_commits)
            assert now - last_commit < _SECONDS_WITHOUT_A_COMMIT, f"no commit for long; see {self._logs}"
            time.sleep(0.1)  # things go wrong at times that are drawn
        self._mend()
        self._check(capture)

    def _check(self, capture: FaultCapture) -> None:
        report, events = self.report, self._cluster.faults.read_events()
        self._cluster.check_nobody_works()
        report.garbage += len(check_whole(capture, dead=capture.marked, reason="invalid_signal"))
        report.captures += 1
        report.units += capture.count_commits()
        report.documents += len(capture.texts)
        report.dead_letters += len(capture.marked)
        report.won += sum(event["what"] == "won" for event in events)
        report.lost += sum(event["what"] == "lost" for event in events)

    def _start(self, capture: FaultCapture, *arguments: str) -> None:
        self.report.drivers += 1
        self._drivers.append(self._cluster.start(capture, *arguments, log=self._logs))

    def _collect_drivers(self, capture: FaultCapture) -> bool:
        """Whether all drivers have ended, the last one with its work done; another is started where it was not."""
        codes = []
        for driver in [driver for driver in self._drivers if driver.poll() is not None]:
            self._drivers.remove(driver)
            driver.communicate()
            self.report.exits[driver.returncode] += 1
            expected = (DONE, SET_ASIDE, OUTSIDE, -signal.SIGKILL)
            assert driver.returncode in expected, f"exit {driver.returncode}; see {self._logs}"
            codes.append(driver.returncode)
        if self._drivers or not codes:
            return False
        if codes[-1] == DONE:
            return True
        self._start(capture, *(["--retry-quarantined"] if codes[-1] == SET_ASIDE else []))
        return False

    def _note(self, kind: str, what: str = "") -> None:
        self.report.log.append((round(time.monotonic() - self._started, 1), kind, what))

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        self._later.append((time.monotonic() + seconds, action))

    def _mend(self) -> None:
        """Bring to an end what is still going wrong."""
        while self._later:
            self._later.pop(0)[1]()
        self._proxy.set()

    def _break_something(self, capture: FaultCapture) -> None:
        faults: list[Callable[[FaultCapture], None]] = [
            self._kill_actor,
            self._kill_actor_at_a_step,
            self._pause_actor,
            self._kill_driver,
            self._start_second_driver,
            self._remove_machine,
            self._silence_machine,
            self._refuse_requests,
            self._lose_responses,
            self._fill_disk,
            self._run_out_of_memory,
        ]
        self._random.choice(faults)(capture)

    def _kill_actor(self, capture: FaultCapture) -> None:
        for process in self._choose(self._cluster.find_actors()):
            os.kill(process, signal.SIGKILL)
            self._note("actor killed", str(process))

    def _kill_actor_at_a_step(self, capture: FaultCapture) -> None:
        place = self._random.choice(_PLACES)
        self._cluster.faults.add(Fault(place=place, kind="kill"))
        self._note(f"actor killed, its unit {place}")

    def _pause_actor(self, capture: FaultCapture) -> None:
        for process in self._choose(self._cluster.find_actors()):
            os.kill(process, signal.SIGSTOP)
            self._after(self._random.uniform(3, 15), partial(_continue, process))
            self._note("actor paused", str(process))

    def _kill_driver(self, capture: FaultCapture) -> None:
        for driver in self._choose(self._drivers):
            driver.kill()
            self._note("driver killed", str(driver.pid))

    def _start_second_driver(self, capture: FaultCapture) -> None:
        if len(self._drivers) == 1:
            self._start(capture)
            self._note("second driver")

    def _remove_machine(self, capture: FaultCapture) -> None:
        machines = self._cluster.machines
        if len(machines.nodes) == self._num_machines:
            node = self._random.choice(machines.nodes)
            machines.remove(node)
            self._after(self._random.uniform(1, 20), self._add_machine)
            self._note("machine taken away, another joins", node[:8])

    def _silence_machine(self, capture: FaultCapture) -> None:
        """Told dead by the head, while its actor may go on for a while."""
        machines = self._cluster.machines
        if len(machines.nodes) == self._num_machines:
            node = self._random.choice(machines.nodes)
            self._cluster.stop(node)
            self._after(self._random.uniform(15, 30), partial(self._replace_machine, node))
            self._note("machine cut off, another joins", node[:8])

    def _replace_machine(self, node: str) -> None:
        if node in self._cluster.machines.nodes:
            self._cluster.machines.remove(node)
        self._add_machine()

    def _add_machine(self) -> None:
        if len(self._cluster.machines.nodes) < self._num_machines:
            self._cluster.machines.add(num_cpus=1)

    def _refuse_requests(self, capture: FaultCapture) -> None:
        seconds = self._random.choice(self._outages)
        self._break_storage(Rule(fault="refuse"), seconds, f"storage refuses for {seconds:g} s")

    def _lose_responses(self, capture: FaultCapture) -> None:
        fault = self._random.choice(["lose_response", "reset", "refuse_after"])
        self._break_storage(Rule(fault=fault, probability=0.3), 20, f"storage: {fault}, every third request, 20 s")

    def _break_storage(self, rule: Rule, seconds: float, kind: str) -> None:
        if not self._proxy.rules:
            self._proxy.set(rule, seed=self._random.randrange(1000))
            self._after(seconds, self._proxy.set)
            self._note(kind)

    def _fill_disk(self, capture: FaultCapture) -> None:
        self._cluster.faults.add(Fault(place="spilling", kind="full_disk", times=3))
        self._note("disk full under a shard, 3 times")

    def _run_out_of_memory(self, capture: FaultCapture) -> None:
        self._cluster.faults.add(Fault(place="scoring", kind="out_of_memory", sequences=8, times=3))
        self._note("memory too small for a batch, 3 times")

    def _choose(self, among: list[Item]) -> list[Item]:
        return [self._random.choice(among)] if among else []


def _continue(process: int) -> None:
    try:
        os.kill(process, signal.SIGCONT)
    except ProcessLookupError:
        return


def save_poisoned_teacher(folder: Path) -> Path:
    """A teacher whose logits are not numbers wherever the marker has stood."""
    save_model("llama", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer(MARKER)["input_ids"]] = torch.nan
    model.save_pretrained(folder)
    return folder
