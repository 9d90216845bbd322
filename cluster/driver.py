"""The capture driver: a queue of units, a pool of actors, and no state that a rerun would miss.

Every fact that must survive is a commit or a quarantine record in the store, so the driver may die at any line: run it
again and it lists what is committed and goes on with the rest. What an actor's end costs:

- the actor, its node or the machine is gone: its units go back to the front of the queue, for free;
- the teacher failed on a unit: the unit is tried again, elsewhere if possible, and set aside after `tries` failures;
- the storage failed: the unit waits and is tried again; only storage that stays broken ends the capture.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cluster.actor import CaptureActor
from cluster.progress import CaptureFigures, CaptureProgress
from cluster.settings import ClusterCaptureSettings
from logitstore.capture import Receipt, build_plan
from logitstore.errors import CaptureError, IncompatibleStoreError, LogitStoreError, OutsideError
from logitstore.store.commit import (
    COMMITS,
    QUARANTINE,
    Outcome,
    QuarantinedUnit,
    build_attempt,
    build_quarantine_path,
    list_units,
    quarantine_unit,
)
from logitstore.store.files import StoreFiles
from logitstore.store.manifest import write_manifest
from logitstore.store.plan import StorePlan, create_plan
from logitstore.teacher.protocol import TeacherIdentity

_LOG = logging.getLogger("logitstore.capture")
# A unit that takes this many actors down with it is the cause, not the victim.
_ACTORS_A_UNIT_MAY_KILL = 6
_STORAGE_TRIES = 8
_LOAD_TRIES = 4
_REST_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class CaptureReport:
    """What one run of a capture did, and where the store stands after it."""

    figures: CaptureFigures
    manifest_number: int | None
    quarantined_units: tuple[int, ...]


@dataclass(kw_only=True, eq=False)
class _Slot:
    """One actor, what it has been sent, and when it may be sent more."""

    actor: Any
    in_flight: int = 0
    is_ready: bool = False
    is_loading: bool = False
    load_failures: int = 0
    rests_until: float = 0.0


@dataclass(kw_only=True)
class _Queue:
    """Units still to do, and what has gone wrong with each."""

    pending: deque[int] = field(default_factory=deque)
    failures: Counter[int] = field(default_factory=Counter)
    actors_killed: Counter[int] = field(default_factory=Counter)
    storage_failures: int = 0


def run_capture(
    settings: ClusterCaptureSettings, *, retry_quarantined: bool = False, quiet: bool = False
) -> CaptureReport:
    """Capture whatever of the corpus is not in the store yet. Call inside `cluster.connection.connect`.

    Args:
        settings: the capture.
        retry_quarantined: try units again that an earlier run set aside.
        quiet: no progress on stderr.
    Raises:
        IncompatibleStoreError: the store was made with other settings, or by another teacher.
        TeacherError, ConfigError: the teacher cannot be loaded, or a setting does not fit it.
        OutsideError: storage or cluster stayed broken; what is committed stays.
    """
    return _Driver(settings, quiet=quiet).run(retry_quarantined=retry_quarantined)


class _Driver:
    def __init__(self, settings: ClusterCaptureSettings, *, quiet: bool) -> None:
        self._settings = settings
        self._files = StoreFiles(settings.store, settings.storage_options)
        self._figures = CaptureFigures()
        self._progress = CaptureProgress(self._figures, quiet=quiet)
        self._slots: list[_Slot] = []
        self._tasks: dict[Any, tuple[_Slot, int | None]] = {}
        self._queue = _Queue()
        self._plan: StorePlan | None = None

    def run(self, *, retry_quarantined: bool) -> CaptureReport:
        self._slots = [_Slot(actor=self._start_actor()) for _ in range(self._count_actors())]
        try:
            with self._progress:
                self._plan = create_plan(self._files, build_plan(self._settings, self._load_first()))
                self._fill_queue(self._plan, retry_quarantined=retry_quarantined)
                while self._queue.pending or self._has_units_in_flight():
                    self._feed()
                    self._collect(timeout=1.0)
                    self._progress.update()
        finally:
            for slot in self._slots:
                self._release(slot)
        manifest = write_manifest(self._files, self._plan.compute_fingerprint())
        quarantined = tuple(list_units(self._files, QUARANTINE))
        return CaptureReport(figures=self._figures, manifest_number=manifest.number, quarantined_units=quarantined)

    def _count_actors(self) -> int:
        wanted = self._settings.actors
        if wanted.count is not None:
            return wanted.count
        total = ray.cluster_resources()
        gpus = total.get("GPU", 0.0)
        per_actor = gpus / (wanted.gpus or 1.0) if gpus else total.get("CPU", 1.0) / (wanted.cpus or 2.0)
        return max(1, int(per_actor))

    def _start_actor(self) -> Any:
        wanted = self._settings.actors
        has_gpus = ray.cluster_resources().get("GPU", 0.0) > 0
        cpus = wanted.cpus if wanted.cpus is not None else min(2.0, ray.cluster_resources().get("CPU", 1.0))
        gpus = wanted.gpus if wanted.gpus is not None else float(has_gpus)
        actor_class: Any = CaptureActor
        return actor_class.options(num_cpus=cpus, num_gpus=gpus).remote(self._settings)

    def _load_first(self) -> TeacherIdentity:
        """Let every actor load; the first teacher that is there says who it is."""
        while True:
            self._feed()
            self._collect(timeout=1.0)
            for slot in self._slots:
                if slot.is_ready:
                    return ray.get(slot.actor.load.remote())[0]  # type: ignore[no-any-return]

    def _fill_queue(self, plan: StorePlan, *, retry_quarantined: bool) -> None:
        units = range(len(plan.build_unit_table()))
        committed = set(list_units(self._files, COMMITS))
        quarantined = set(list_units(self._files, QUARANTINE))
        if retry_quarantined:
            for unit in quarantined:
                self._files.delete(build_quarantine_path(unit))
            quarantined = set()
        self._queue.pending.extend(unit for unit in units if unit not in committed and unit not in quarantined)
        self._figures.units_planned = len(units)
        self._figures.units_before = len(committed & set(units))
        self._figures.quarantined = len(quarantined)
        _LOG.info("%d units planned, %d committed, %d to do", len(units), len(committed), len(self._queue.pending))

    def _has_units_in_flight(self) -> bool:
        return any(unit is not None for _, unit in self._tasks.values())

    def _feed(self) -> None:
        """Give every rested actor work: loading first, then units."""
        now = time.monotonic()
        for slot in self._slots:
            if slot.rests_until > now:
                continue
            if not slot.is_ready:
                if not slot.is_loading:
                    slot.is_loading = True
                    self._tasks[slot.actor.load.remote()] = slot, None
                continue
            while self._queue.pending and slot.in_flight < self._settings.actors.units_in_flight:
                unit = self._queue.pending.popleft()
                slot.in_flight += 1
                self._tasks[slot.actor.capture.remote(unit, build_attempt())] = slot, unit
        if self._plan is not None and not self._queue.pending:
            idle = [slot for slot in self._slots if slot.in_flight == 0]
            for slot in idle if self._has_units_in_flight() else []:
                self._release(slot)  # nothing left for it: its machine may go

    def _collect(self, timeout: float) -> None:
        """Take in whatever has ended."""
        if not self._tasks:
            time.sleep(min(timeout, _REST_SECONDS))  # every actor rests
            return
        done, _ = ray.wait(list(self._tasks), num_returns=1, timeout=timeout)
        more, _ = ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
        for task in dict.fromkeys([*done, *more]):
            slot, unit = self._tasks.pop(task)
            if unit is None:
                self._end_load(slot, task)
            else:
                slot.in_flight -= 1
                self._end_unit(slot, unit, task)

    def _end_load(self, slot: _Slot, task: Any) -> None:
        slot.is_loading = False
        try:
            identity, _ = ray.get(task)
        except RayTaskError as error:
            raise _unwrap(error) from error
        except RayError as error:
            slot.load_failures += 1
            self._figures.actor_losses += 1
            if slot.load_failures >= _LOAD_TRIES:
                raise OutsideError(
                    f"a capture actor died {slot.load_failures} times while it loaded the teacher, last with {error}; "
                    "look for lack of memory on its machine"
                ) from error
            slot.rests_until = time.monotonic() + _REST_SECONDS
            return
        differences = self._plan.teacher.differences(identity) if self._plan is not None else []
        if differences:
            raise IncompatibleStoreError(
                "an actor loaded another teacher than the plan's; give every machine the same files:\n  "
                + "\n  ".join(differences)
            )
        slot.is_ready, slot.load_failures = True, 0
        self._figures.actors_ready += 1

    def _end_unit(self, slot: _Slot, unit: int, task: Any) -> None:
        try:
            receipt: Receipt = ray.get(task)
        except RayTaskError as error:
            self._end_failed_unit(slot, unit, _unwrap(error))
        except RayError as error:
            self._end_lost_unit(slot, unit, error)
        else:
            self._queue.storage_failures = 0
            self._count_receipt(receipt)

    def _count_receipt(self, receipt: Receipt) -> None:
        figures = self._figures
        if receipt.outcome is Outcome.LOST:
            figures.lost_races += 1
            return
        figures.units_captured += 1
        figures.records += receipt.records
        figures.positions += receipt.positions
        figures.bytes += receipt.bytes
        figures.documents += receipt.documents
        figures.dead_letters += receipt.dead_letters

    def _end_failed_unit(self, slot: _Slot, unit: int, error: Exception) -> None:
        """The actor lives and reports an error."""
        if isinstance(error, IncompatibleStoreError):
            raise error
        if isinstance(error, OutsideError):
            self._queue.storage_failures += 1
            if self._queue.storage_failures >= _STORAGE_TRIES * len(self._slots):
                raise error
            self._queue.pending.append(unit)
            slot.rests_until = time.monotonic() + _REST_SECONDS * min(30, self._queue.storage_failures)
            _LOG.warning("unit %d waits: %s", unit, error)
            return
        self._figures.failures += 1
        self._queue.failures[unit] += 1
        _LOG.warning(
            "unit %d failed (%d of %d): %s", unit, self._queue.failures[unit], self._settings.actors.tries, error
        )
        if self._queue.failures[unit] < self._settings.actors.tries:
            self._queue.pending.append(unit)
        else:
            self._quarantine(unit, self._queue.failures[unit], f"{type(error).__name__}: {error}")

    def _end_lost_unit(self, slot: _Slot, unit: int, error: RayError) -> None:
        """The actor or its machine is gone; Ray restarts the actor wherever there is room."""
        self._figures.actor_losses += 1
        self._queue.actors_killed[unit] += 1
        if slot.is_ready:
            slot.is_ready = False
            self._figures.actors_ready -= 1
        slot.rests_until = time.monotonic() + _REST_SECONDS
        kind = "actor lost" if isinstance(error, RayActorError) else type(error).__name__
        _LOG.warning("unit %d goes back to the queue: %s", unit, kind)
        if self._queue.actors_killed[unit] >= _ACTORS_A_UNIT_MAY_KILL * self._settings.actors.units_in_flight:
            self._quarantine(unit, self._queue.actors_killed[unit], f"its actor dies every time: {error}")
        else:
            self._queue.pending.appendleft(unit)

    def _quarantine(self, unit: int, attempts: int, error: str) -> None:
        quarantine_unit(self._files, QuarantinedUnit(unit=unit, attempts=attempts, error=error[:4000]))
        self._figures.quarantined += 1
        _LOG.error("unit %d is set aside after %d attempts: %s", unit, attempts, error)

    def _release(self, slot: _Slot) -> None:
        if slot in self._slots:
            self._slots = [other for other in self._slots if other is not slot]
            self._figures.actors_ready -= slot.is_ready
            ray.kill(slot.actor)


def _unwrap(error: RayTaskError) -> Exception:
    """The error that the actor raised."""
    cause = error.cause
    if isinstance(cause, LogitStoreError):
        return cause
    return CaptureError(str(cause if cause is not None else error))
