"""Records per second, bytes on disk and waiting times of streams over the same records."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from logitstore.errors import OutsideError
from tools.benchmark.stream_processes import PEERS, Epoch, Figure, copy_linked, measure_bytes, run_peer, run_step

# What is kept or compiled in the first epoch is still being so in the second.
_EPOCHS = 3
STORE_NAME, SCRATCH_NAME = "logitstore", "logitstore, with a scratch file"
HEADER = (
    "bytes per record",
    "records per CPU-second",
    "records/s",
    "first batch, s",
    "resumed, s",
    "third epoch, records per CPU-second",
    "bytes on disk after it",
)


@dataclass(kw_only=True)
class Reader:
    """A way of reading the records: where they lie, how they are read, and what that cost so far.

    `read` and `resume` are given a folder in which nobody has read before.
    """

    name: str
    folder: Path
    read: Callable[[Path], list[dict[str, float]]]
    resume: Callable[[Path], float] | None = None
    is_peer: bool = False
    epochs: list[list[Epoch]] = field(default_factory=list)
    resumed_seconds: list[float] = field(default_factory=list)
    bytes_after: int = 0

    def repeat(self, scratch: Path, records: int, token_sum: int) -> None:
        """Read once more.

        Raises:
            OutsideError: not all records came, or others.
        """
        fresh = copy_linked(self.folder, scratch)
        epochs = [Epoch(**values) for values in self.read(fresh)]  # type: ignore[arg-type]  # JSON knows no integers
        for epoch in epochs:
            if (epoch.records, epoch.token_sum) != (records, token_sum):
                raise OutsideError(
                    f"{self.name}: expected {records} records with ids of {token_sum} in all, found {epoch.records} "
                    f"with {epoch.token_sum}; what it delivers cannot be compared"
                )
        self.epochs.append(epochs)
        self.bytes_after = measure_bytes(fresh) + epochs[-1].scratch_bytes
        shutil.rmtree(scratch)
        if self.resume is not None:
            self.resumed_seconds.append(self.resume(copy_linked(self.folder, scratch)))
            shutil.rmtree(scratch)

    def compute_rate(self, epoch: int) -> Figure:
        """Records per CPU-second in one of the epochs."""
        return Figure(values=tuple(run[epoch].records / run[epoch].processor_seconds for run in self.epochs))

    def build_row(self, records: int) -> list[str]:
        """Of the table under `HEADER`."""
        first = [run[0] for run in self.epochs]
        return [
            self.name,
            f"{measure_bytes(self.folder) / records:,.0f}",
            self.compute_rate(0).format(),
            Figure(values=tuple(epoch.records / epoch.seconds for epoch in first)).format(),
            Figure(values=tuple(epoch.first_seconds for epoch in first)).format(2),
            Figure(values=tuple(self.resumed_seconds)).format(2) if self.resumed_seconds else "–",
            self.compute_rate(-1).format(),
            f"{self.bytes_after / records:,.0f}",
        ]


def measure_throughput(
    work: Path, arrays: Path, stores: dict[str, Path], *, batch: int, repeats: int, peers_python: Path | None
) -> list[Reader]:
    """Read the records of `arrays` from stores, `STORE_NAME` and others, and from the peers' data sets, in turns."""
    tokens = np.load(arrays / "token_ids.npy", mmap_mode="r")
    middle = len(tokens) // batch // 2
    ways: list[tuple[str, Path, str | None]] = [(name, store, None) for name, store in stores.items()]
    if find_spec("xxhash") is not None:  # which a scratch needs
        ways.append((SCRATCH_NAME, stores[STORE_NAME], str(work)))
    readers = [
        Reader(
            name=name,
            folder=store,
            read=partial(_read_store, batch, scratch_folder),
            resume=lambda folder: run_step("resume", folder=str(folder), batch=batch, start_step=middle),
        )
        for name, store, scratch_folder in ways
    ]
    for peer in PEERS if peers_python is not None else ():
        assert peers_python is not None
        readers += _build_peer(peers_python, peer, work, arrays, batch, middle * batch)
    for _ in range(repeats):
        for reader in readers:
            reader.repeat(work / "read", len(tokens), int(tokens.sum(dtype=np.int64)))
    return readers


def _read_store(batch: int, scratch_folder: str | None, fresh: Path) -> Any:
    return run_step("read", folder=str(fresh), batch=batch, epochs=_EPOCHS, scratch_folder=scratch_folder)


def _build_peer(python: Path, peer: str, work: Path, arrays: Path, batch: int, middle: int) -> list[Reader]:
    """A peer that delivers batches like ours, and the same peer with its records as they come."""
    folder = work / peer
    run_peer(python, peer, "write", arrays=str(arrays), folder=str(folder))
    # In the one folder where everything is read: the state of litdata goes on nowhere else.
    state = run_peer(python, peer, "stop", folder=str(copy_linked(folder, work / "read")), batch=batch, records=middle)
    shutil.rmtree(work / "read")

    def read(is_joined: bool, fresh: Path) -> Any:
        task = {"batch": batch, "epochs": _EPOCHS, "is_joined": is_joined}
        return run_peer(python, peer, "read", folder=str(fresh), **task)

    def resume(fresh: Path) -> Any:
        return run_peer(python, peer, "resume", folder=str(fresh), batch=batch, state=state)

    name = run_peer(python, peer, "version")
    return [
        Reader(name=name, folder=folder, read=partial(read, True), resume=resume, is_peer=True),
        Reader(name=f"{name}, records as they come", folder=folder, read=partial(read, False), is_peer=True),
    ]


def build_ratio_row(ours: Reader, readers: list[Reader]) -> list[str]:
    """One of ours to the better peer, of those that deliver the same batches; column by column."""
    peers = [reader for reader in readers if reader.is_peer and reader.resumed_seconds]
    size = min(measure_bytes(peer.folder) for peer in peers)

    def compare(epoch: int) -> str:
        best = max(peer.compute_rate(epoch).median for peer in peers)
        return f"{ours.compute_rate(epoch).median / best:.2f}"

    share = f"{measure_bytes(ours.folder) / size:.2f}"
    return [f"{ours.name} to the better peer", share, compare(0), "–", "–", "–", compare(-1), "–"]
