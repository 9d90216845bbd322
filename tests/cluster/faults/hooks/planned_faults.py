"""Faults at exact places of a capture, as a test has planned them; the same module for the test and for the actors.

A folder holds the plan, one file for each time that a fault has struck (whoever creates it strikes), and a log of what
the actors did. Light: every Python process with a folder of faults imports this.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

FOLDER = "LOGITSTORE_TEST_FAULTS"
_PLAN, _EVENTS, _STRIKES, _RELEASED = "plan.json", "events.jsonl", "strikes", "released"
_MOST_BYTES = 512  # of a file, on a disk that is full: less than any shard
_TOO_MANY_BYTES = 2**62

Place = Literal["scoring", "scored", "spilling", "stored", "committed"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens where, and how often.

    Attributes:
        place: "scoring" a batch; "scored": the first record of a unit is there; "spilling": the shard is to be written;
            "stored": its file is in the store; "committed": so is its commit, and nobody has been told.
        kind: the process is killed; or frozen, and does not even answer; or waits until it is released; or its disk is
            full; or its memory.
        units: where it strikes; None everywhere.
        times: how often, None always.
        sequences: of "scoring": batches of at least that many.
        token_id: of "scoring": batches with that token in them.
        nodes: machines that it strikes on; None on all.
    """

    place: Place
    kind: Literal["kill", "freeze", "wait", "full_disk", "out_of_memory"]
    units: tuple[int, ...] | None = None
    times: int | None = 1
    sequences: int = 1
    token_id: int | None = None
    nodes: tuple[str, ...] | None = None


class FaultFolder:
    """A plan of faults, and what has come of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def plan(self, *faults: Fault) -> None:
        """Begin anew with these faults."""
        (self.folder / _STRIKES).mkdir(parents=True, exist_ok=True)
        for path in [*(self.folder / _STRIKES).iterdir(), self.folder / _EVENTS, self.folder / _RELEASED]:
            path.unlink(missing_ok=True)
        self._write([asdict(fault) for fault in faults])

    def add(self, *faults: Fault) -> None:
        """Plan more, beside what is planned and what has come of it."""
        self._write([*self._read(), *(asdict(fault) for fault in faults)])

    def release(self) -> None:
        """Let all who wait go on."""
        (self.folder / _RELEASED).touch()

    def read_events(self, what: str | None = None) -> list[dict[str, Any]]:
        """What the actors have written down so far, in order."""
        path = self.folder / _EVENTS
        lines = path.read_text().splitlines() if path.exists() else []
        events = [json.loads(line) for line in lines]
        return [event for event in events if what in (None, event["what"])]

    def count_strikes(self) -> int:
        return len(list((self.folder / _STRIKES).iterdir()))

    def log(self, what: str, **facts: Any) -> None:
        line = json.dumps({"what": what, **facts, "process": os.getpid(), "node": find_node()}) + "\n"
        with _limited_files(None):  # also where the disk is full just now
            descriptor = os.open(self.folder / _EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            try:
                os.write(descriptor, line.encode())  # at once: others write too
            finally:
                os.close(descriptor)

    def find(self, place: Place, unit: int | None = None, *, sequences: Any = ()) -> Fault | None:
        """The fault that strikes here and now; it has struck then."""
        for number, values in enumerate(self._read()):
            fault = Fault(**{**values, "units": None if values["units"] is None else tuple(values["units"])})
            if fault.place == place and _is_meant(fault, unit, sequences) and self._claim(number, fault):
                return fault
        return None

    def wait(self) -> None:
        while not (self.folder / _RELEASED).exists():
            time.sleep(0.05)  # the test says when

    def _read(self) -> list[dict[str, Any]]:
        path = self.folder / _PLAN
        planned: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        return planned

    def _write(self, planned: list[dict[str, Any]]) -> None:
        unfinished = self.folder / f"{_PLAN}.new"
        unfinished.write_text(json.dumps(planned))
        unfinished.replace(self.folder / _PLAN)

    def _claim(self, number: int, fault: Fault) -> bool:
        if fault.times is None:
            return True
        for time_of_it in range(fault.times):
            with contextlib.suppress(FileExistsError):
                (self.folder / _STRIKES / f"{number}-{time_of_it}").touch(exist_ok=False)
                return True
        return False


def _is_meant(fault: Fault, unit: int | None, sequences: Any) -> bool:
    if fault.units is not None and unit not in fault.units:
        return False
    if fault.nodes is not None and find_node() not in fault.nodes:
        return False
    if len(sequences) < fault.sequences and fault.place == "scoring":
        return False
    return fault.token_id is None or any(bool((ids == fault.token_id).any()) for ids in sequences)


def find_node() -> str | None:
    """Id of the machine, in a process of Ray's."""
    import ray

    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else None


def _strike(folder: FaultFolder, place: Place, unit: int | None = None, attempt: str = "", sequences: Any = ()) -> None:
    fault = folder.find(place, unit, sequences=sequences)
    if fault is None:
        return
    folder.log(fault.kind, place=place, unit=unit, attempt=attempt)
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.kind == "wait":
        folder.wait()
    elif fault.kind == "out_of_memory":
        import torch

        torch.empty(_TOO_MANY_BYTES, dtype=torch.uint8)  # what the allocator says to that is its own
    else:
        raise _FullDisk


class _FullDisk(Exception):  # noqa: N818  # no error: how a fault is told
    pass


@contextlib.contextmanager
def _limited_files(most_bytes: int | None) -> Iterator[None]:
    """No file of this process may grow beyond: the kernel refuses, as it does where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if most_bytes is None else most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def patch_capture(module: Any) -> None:
    """Strike between the steps of `logitstore.capture`, and write down what comes of every commit."""
    folder = FaultFolder(Path(os.environ[FOLDER]))
    write_shard, commit_unit = module.write_shard, module.commit_unit

    @functools.wraps(write_shard)
    def write(path: Path, records: Any, header: Any, settings: Any) -> Any:
        def watch() -> Iterator[Any]:
            for index, record in enumerate(records):
                yield record
                if index == 0:
                    _strike(folder, "scored", header.unit)

        try:
            _strike(folder, "spilling", header.unit)
        except _FullDisk:
            with _limited_files(_MOST_BYTES):
                return write_shard(path, watch(), header, settings)
        return write_shard(path, watch(), header, settings)

    @functools.wraps(commit_unit)
    def commit(files: Any, commit: Any) -> Any:
        _strike(folder, "stored", commit.unit, commit.attempt)
        outcome = commit_unit(files, commit)
        folder.log(str(outcome), unit=commit.unit, attempt=commit.attempt)
        _strike(folder, "committed", commit.unit, commit.attempt)
        return outcome

    module.write_shard, module.commit_unit = write, commit


def patch_head(module: Any) -> None:
    """Strike when a transformers teacher begins with a batch."""
    folder = FaultFolder(Path(os.environ[FOLDER]))
    compute = module.ChunkedLogits.compute

    def compute_if_spared(logits: Any, sequences: Any) -> Any:
        _strike(folder, "scoring", sequences=sequences)
        return compute(logits, sequences)

    module.ChunkedLogits.compute = compute_if_spared


def patch_pooler(module: Any) -> None:
    """Strike when a vLLM teacher begins with the head of a chunk."""
    folder = FaultFolder(Path(os.environ[FOLDER]))
    score = module.TeacherPooler._score

    def score_if_spared(pooler: Any, hidden: Any, places: Any, start: int, stop: int) -> Any:
        _strike(folder, "scoring", sequences=[*places.token_ids[start:stop][:, None]])
        return score(pooler, hidden, places, start, stop)

    module.TeacherPooler._score = score_if_spared


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "logitstore.capture": patch_capture,
    "logitstore.teacher.head": patch_head,
    "logitstore.teacher.vllm_model": patch_pooler,
}
