"""A cluster that is made up: machines and actors whose every answer a test writes, and a clock that only waits move."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from made_up import VOCAB_SIZE, build_identity, build_records, put_shard
from ray.exceptions import RayTaskError

from cluster import capture_loop, driver, load_ends, pool, unit_ends
from cluster.actor import LoadedTeacher
from cluster.actor_groups import ActorGroup
from cluster.placement import Machine
from cluster.settings import ClusterCaptureSettings
from logitstore.capture import Receipt
from logitstore.settings import build_settings
from logitstore.store.commit import commit_unit
from logitstore.store.files import StoreFiles
from logitstore.store.plan import read_plan
from logitstore.unit_records import UnitCare


def raised_in_actor(cause: Exception) -> Exception:
    """What `ray.get` raises for it."""
    text = f"ray::CaptureActor (pid=1, ip=10.0.0.1)\n  File made up\n{type(cause).__name__}: {cause}"
    return RayTaskError("call", text, cause, proctitle="actor", pid=1, ip="10.0.0.1").as_instanceof_cause()


@dataclass(eq=False)
class MadeUpActor:
    number: int
    group: ActorGroup
    calls: list[int] = field(default_factory=list)


@dataclass
class MadeUpCluster:
    """Stands in for `RayCluster` and the clock.

    Attributes:
        answer_load, answer_capture: (actor, unit) to an exception, or None for success; what a call comes to.
        seconds: that an actor takes for a unit, or for a load where it is None; by default every call ends at once.
        ends: whether anything has ended when somebody waits for it.
        machine_of: an actor's, by its number.
        started, ended: numbers of actors, in order; one that takes the place of another has its number.
        cancelled: units whose calls were cancelled.
    """

    settings: ClusterCaptureSettings
    folder: Path
    machines: list[Machine] = field(default_factory=lambda: [Machine(node_id="n0", resources={"CPU": 8.0})])
    answer_load: Callable[[int], Exception | None] = lambda actor: None
    answer_capture: Callable[[int, int], Exception | None] = lambda actor, unit: None
    identity_of: Callable[[int], Any] = lambda actor: build_identity()
    machine_of: Callable[[int], str] = lambda actor: f"n{actor}"
    seconds: Callable[[int, int | None], float] = lambda actor, unit: 0.0
    ends: Callable[[float], bool] = lambda now: True
    now: float = 0.0
    cares: list[tuple[int, UnitCare | None]] = field(default_factory=list)
    started: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    sent: list[tuple[int, int]] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._numbers = itertools.count()
        self._answers: dict[int, Callable[[], Any]] = {}
        self._ends_at: dict[int, float] = {}
        self._unit_of: dict[int, int] = {}

    def monotonic(self) -> float:
        return self.now

    def read_machines(self) -> list[Machine]:
        return self.machines

    def read_draining(self) -> dict[str, float | None]:
        return {}

    def read_free(self) -> dict[str, float]:
        return {"CPU": 1.0}

    def start(self, number: int, group: ActorGroup) -> MadeUpActor:
        self.started.append(number)
        return MadeUpActor(number, group)

    def end(self, actor: MadeUpActor) -> None:
        self.ended.append(actor.number)

    def load(self, actor: MadeUpActor) -> int:
        return self._call(actor, None, lambda: self._load(actor.number))

    def capture(self, actor: MadeUpActor, unit: int, attempt: str, care: UnitCare | None) -> int:
        self.cares.append((unit, care))
        self.sent.append((actor.number, unit))
        return self._call(actor, unit, lambda: self._capture(actor.number, unit, attempt))

    def wait(self, timeout: float) -> list[int]:
        """What has ended by now, or what ends next within the timeout."""
        due = [at for at in self._ends_at.values() if at <= self.now + timeout]
        if not due or not self.ends(self.now + timeout):
            self.now += timeout
            return []
        self.now = max(self.now, min(due))
        ended = [call for call, at in self._ends_at.items() if at <= self.now]
        for call in ended:
            del self._ends_at[call]
        return sorted(ended)

    def fetch(self, call: int) -> Any:
        return self._answers.pop(call)()

    def forget(self, call: int, *, cancel: bool = False) -> None:
        self._answers.pop(call)
        self._ends_at.pop(call, None)
        if cancel:
            self.cancelled.append(self._unit_of[call])

    def _call(self, actor: MadeUpActor, unit: int | None, answer: Callable[[], Any]) -> int:
        call = next(self._numbers)
        # An actor does one thing after the other.
        starts_at = max([self.now, *(self._ends_at.get(earlier, 0.0) for earlier in actor.calls)])
        actor.calls.append(call)
        self._answers[call] = answer
        self._ends_at[call] = starts_at + self.seconds(actor.number, unit)
        if unit is not None:
            self._unit_of[call] = unit
        return call

    def _load(self, actor: int) -> LoadedTeacher:
        error = self.answer_load(actor)
        if error is not None:
            raise error
        node_ids = (self.machine_of(actor),)
        return LoadedTeacher(identity=self.identity_of(actor), host=f"node-{actor}", process=actor, node_ids=node_ids)

    def _capture(self, actor: int, unit: int, attempt: str) -> Receipt:
        error = self.answer_capture(actor, unit)
        if error is not None:
            raise error
        files = StoreFiles(self.settings.store)
        records = build_records(2, unit=unit, vocab_size=VOCAB_SIZE)
        commit = put_shard(files, read_plan(files), unit, records, attempt, self.folder)
        assert commit.shard is not None
        return Receipt(
            unit=unit,
            outcome=commit_unit(files, commit),
            records=commit.shard.records,
            positions=commit.shard.positions,
            bytes=commit.shard.bytes,
            documents=commit.documents,
            dead_letters=0,
            seconds=self.seconds(actor, unit),
        )


def build_made_up_cluster(
    folder: Path, monkeypatch: pytest.MonkeyPatch, num_units: int, **settings: Any
) -> MadeUpCluster:
    """A made-up cluster for captures of so many units, which every capture of the test runs on."""
    line = '{"text": "some words that are read"}\n'
    (folder / "corpus.jsonl").write_text(line * num_units * 4)
    values = {
        "store": str(folder / "store"),
        "corpus": {"files": [str(folder / "corpus.jsonl")]},
        "teacher": {"model": "made-up"},
        "sequences": {"length": 8},
        "unit_bytes": len(line) * 4,
        **settings,
    }
    (folder / "spill").mkdir()
    made_up = MadeUpCluster(build_settings(ClusterCaptureSettings, values, where="test"), folder / "spill")
    for module in (capture_loop, load_ends, pool, unit_ends):
        monkeypatch.setattr(module, "time", made_up)
    monkeypatch.setattr(driver, "RayCluster", lambda: made_up)
    return made_up
