"""The capture driver: a queue of units, a pool of actors, and no state that a rerun would miss.

Every fact that must survive is a commit or a quarantine record in the store, so the driver may die at any line: run it
again and it lists what is committed and goes on with the rest. What trouble costs (the numbers are in `unit_queue.py`):

- an actor, its node or the machine is gone: its units go back to the front of the queue, for free;
- the teacher failed on a unit: the unit is tried again, elsewhere if possible, and set aside after `tries` failures;
- an actor fails again and again: its process is restarted; one that cannot load any more is dropped;
- the storage failed: the unit waits and is tried again; only storage that stays broken for all ends the capture.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.actor import LoadedTeacher
from cluster.capture_watch import CaptureWatch
from cluster.failures import RAISED, ActorFailure, read_failure
from cluster.figures import CaptureFigures
from cluster.manifests import RunningManifests
from cluster.placement import build_demand, check_placeable, count_actors, describe_nodes, read_nodes
from cluster.pool import ActorPool, EndedCall, Slot
from cluster.report import CaptureReport, build_report, read_standing, report_finished_capture
from cluster.settings import ClusterCaptureSettings, make_paths_absolute
from cluster.unit_queue import QueueLimits, UnitQueue, Verdict
from logitstore.capture import Receipt
from logitstore.errors import CaptureError, IncompatibleStoreError, LogitStoreError, OutsideError
from logitstore.planning import open_plan
from logitstore.store.commit import Outcome, QuarantinedUnit, build_attempt, build_quarantine_path, quarantine_unit
from logitstore.store.files import StoreFiles
from logitstore.store.plan import StorePlan

__all__ = ["CaptureReport", "report_finished_capture", "run_capture"]

_LOG = logging.getLogger("logitstore.capture")
_LOAD_TRIES = 4
_WAIT_SECONDS = 1.0
_SECONDS_BETWEEN_WARNINGS = 30.0


def run_capture(
    settings: ClusterCaptureSettings, *, retry_quarantined: bool = False, extend: bool = False, quiet: bool = False
) -> CaptureReport:
    """Capture whatever of the corpus is not in the store yet. Call inside `cluster.connection.connect`.

    With nothing left to do no actor is started, and the teacher's weights are not compared with the plan's.

    Args:
        settings: the capture. Local paths of store and teacher may be relative to this process's folder.
        retry_quarantined: try units again that an earlier run set aside.
        extend: add corpus files that the store does not have; what it has stays, listed or not.
        quiet: no progress on stderr.
    Raises:
        IncompatibleStoreError: the store was made with other settings, or by another teacher.
        TeacherError, ConfigError: the teacher cannot be loaded, a setting does not fit it, no machine has what an
            actor asks for, or an actor's machine does not see corpus or store.
        CaptureError: nothing could be captured; the message has the first failure.
        OutsideError: storage or cluster stayed broken; what is committed stays, and is in a manifest if possible.
    """
    settings = make_paths_absolute(settings)
    finished = report_finished_capture(settings, retry_quarantined=retry_quarantined, extend=extend)
    if finished is not None:
        return finished
    try:
        return _Driver(settings, quiet=quiet).run(retry_quarantined=retry_quarantined, extend=extend)
    except (RayError, ConnectionError) as error:
        raise OutsideError(
            f"Ray: expected a working cluster, found {type(error).__name__}: {error}; look at the cluster, then run "
            "the command again"
        ) from error


class _Driver:
    _pool: ActorPool
    _plan: StorePlan

    def __init__(self, settings: ClusterCaptureSettings, *, quiet: bool) -> None:
        self._settings = settings
        self._files = StoreFiles(settings.store, settings.storage_options)
        self._figures = CaptureFigures()
        self._watch = CaptureWatch(self._files, settings, self._figures, quiet=quiet)
        self._identity_of: LoadedTeacher | None = None
        self._queue = UnitQueue([], QueueLimits())
        self._first_failure: ActorFailure | None = None
        self._retried: frozenset[int] = frozenset()
        self._next_warning = time.monotonic() + _SECONDS_BETWEEN_WARNINGS

    def run(self, *, retry_quarantined: bool, extend: bool) -> CaptureReport:
        with self._watch:
            return self._run(retry_quarantined=retry_quarantined, extend=extend)

    def _run(self, *, retry_quarantined: bool, extend: bool) -> CaptureReport:
        nodes = read_nodes()
        self._demand = build_demand(self._settings.actors, nodes, self._settings.teacher.num_gpus)
        check_placeable(self._demand, nodes)
        self._pool = ActorPool(self._settings, self._demand, count_actors(self._settings.actors, self._demand, nodes))
        try:
            first = self._load_first()
            self._plan = open_plan(self._files, self._settings, first.identity, extend=extend)
            self._fill_queue(retry_quarantined=retry_quarantined)
            self._capture_units()
        except (LogitStoreError, RayError):
            self._save_manifest()
            raise
        finally:
            self._figures.phase = "finishing"
            self._pool.close()
            self._show_figures()
        return build_report(self._files, self._plan, self._figures)

    def _load_first(self) -> LoadedTeacher:
        """Let every actor load; the first teacher that is there says who it is."""
        while self._identity_of is None:
            self._step()
        return self._identity_of

    def _fill_queue(self, *, retry_quarantined: bool) -> None:
        standing = read_standing(self._files, self._plan)
        to_do = standing.list_to_do(retry_quarantined=retry_quarantined)
        self._retried = standing.quarantined if retry_quarantined else frozenset()
        self._queue = UnitQueue(to_do, QueueLimits(tries=self._settings.actors.tries))
        for slot in self._pool.slots:
            if slot.is_ready:
                self._queue.admit(slot.number)
        standing.fill_figures(self._figures, retry_quarantined=retry_quarantined)
        figures = self._figures
        figures.phase = "capturing"
        _LOG.info("%d units planned, %d committed, %d to do", figures.units_planned, figures.units_before, len(to_do))

    def _capture_units(self) -> None:
        figures = self._figures
        manifests = RunningManifests(self._files, self._plan.compute_fingerprint(), figures.units_before)
        with contextlib.closing(manifests):
            while self._queue.has_units:
                self._step()
                manifests.write_if_due(figures.units_before + figures.units_captured)

    def _save_manifest(self) -> None:
        """So that what is captured can be read although the capture ends in an error."""
        if self._figures.units_captured:
            try:
                build_report(self._files, self._plan, self._figures)
            except LogitStoreError as error:
                _LOG.warning("no manifest was written: %s", error)

    def _step(self) -> None:
        """Give every rested actor work, loading first, then units; take in whatever has ended."""
        now = time.monotonic()
        for slot in self._pool.slots:
            if slot.rests_until > now:
                continue
            if not slot.is_ready and not slot.is_loading:
                self._pool.load(slot)
            ahead = self._settings.actors.units_in_flight
            while (unit := self._queue.take(slot.number, now=now, ahead=ahead)) is not None:
                self._pool.capture(slot, unit, build_attempt())
        self._release_spare()
        for call in self._pool.wait(_WAIT_SECONDS):
            if call.unit is None:
                self._end_load(call)
            else:
                self._end_unit(call.slot, call.unit, call.task)
        self._warn_if_nobody_is_ready()
        if self._watch.is_due:
            self._show_figures()

    def _show_figures(self) -> None:
        figures = self._figures
        figures.actors_ready, figures.actors_wanted = self._pool.num_ready, len(self._pool.slots)
        figures.units_in_flight = len(self._queue.list_in_flight())
        self._watch.update(self._queue.list_in_flight)

    def _release_spare(self) -> None:
        spare = set(self._queue.find_spare(slot.number for slot in self._pool.slots))
        for slot in [slot for slot in self._pool.slots if slot.number in spare]:
            self._queue.remove(slot.number)
            self._pool.release(slot)

    def _warn_if_nobody_is_ready(self) -> None:
        now = time.monotonic()
        if self._pool.num_ready:
            self._next_warning = now + _SECONDS_BETWEEN_WARNINGS
        elif now >= self._next_warning:
            self._next_warning = now + _SECONDS_BETWEEN_WARNINGS
            free = ray.available_resources()
            _LOG.warning(
                "no actor is ready yet; each asks for %s, the cluster has %s, of which %g CPUs, %g GPUs are free",
                self._demand,
                describe_nodes(read_nodes()),
                free.get("CPU", 0.0),
                free.get("GPU", 0.0),
            )

    def _end_load(self, call: EndedCall) -> None:
        slot = call.slot
        try:
            loaded: LoadedTeacher = ray.get(call.task)
        except RAISED as error:
            failure = read_failure(error)
            _LOG.debug("load failed on %s:\n%s", failure.host, failure.traceback)
            self._drop(slot, failure.build_load_error(self._settings.teacher.model))
        except RayError as error:
            self._figures.actor_losses += 1
            slot.load_losses += 1
            self._pool.set_back(slot, _WAIT_SECONDS)
            if slot.load_losses >= _LOAD_TRIES:
                text = (
                    f"a capture actor died {slot.load_losses} times while it loaded the teacher, last with {error}; "
                    "look for lack of memory on its machine"
                )
                self._drop(slot, OutsideError(text))
        else:
            self._admit(slot, loaded)

    def _admit(self, slot: Slot, loaded: LoadedTeacher) -> None:
        """Two machines with two teachers end the capture: which one is right, only a person knows."""
        if self._identity_of is None:
            self._identity_of = loaded
        writes_answers = self._settings.generate is not None
        differences = self._identity_of.identity.differences(loaded.identity, writes_answers=writes_answers)
        if differences:
            raise IncompatibleStoreError(
                f"the actors on {self._identity_of.host} and {loaded.host} loaded different teachers; give every "
                "machine the same files:\n  " + "\n  ".join(differences)
            )
        slot.loaded, slot.load_losses = loaded, 0
        self._queue.admit(slot.number)

    def _drop(self, slot: Slot, error: LogitStoreError) -> None:
        """An actor cannot load: go on without it, unless it is the only one or nobody has loaded yet."""
        self._queue.remove(slot.number)
        self._pool.release(slot)
        is_alone = self._identity_of is None and not isinstance(error, OutsideError)
        if is_alone or not self._pool.slots:
            raise error
        _LOG.error("an actor is dropped, %d are left: %s", len(self._pool.slots), error)

    def _end_unit(self, slot: Slot, unit: int, task: Any) -> None:
        try:
            receipt: Receipt = ray.get(task)
        except RAISED as error:
            self._end_failed_unit(slot, unit, read_failure(error))
        except RayError as error:
            self._end_lost_unit(slot, error)
        else:
            was_captured = receipt.outcome is Outcome.WON
            self._queue.succeed(slot.number, unit, was_captured=was_captured)
            self._watch.count_receipt(receipt)
            if was_captured:
                slot.restarts_in_a_row = 0
            if unit in self._retried:
                self._files.delete(build_quarantine_path(unit))

    def _end_failed_unit(self, slot: Slot, unit: int, failure: ActorFailure) -> None:
        """The actor lives and reports an error."""
        _LOG.debug("unit %d failed on %s:\n%s", unit, slot.host, failure.traceback)
        if isinstance(failure.error, IncompatibleStoreError):
            raise failure.error
        settings_error = failure.build_settings_error()
        if settings_error is not None:
            raise settings_error from failure.error
        if isinstance(failure.error, OutsideError):
            verdict = self._queue.fail_outside(slot.number, unit, now=time.monotonic())
            _LOG.warning("unit %d waits: %s", unit, failure.summary)
            if verdict.give_up:
                raise failure.error
            self._set_aside(verdict, failure.build_record())
            return
        self._figures.failures += 1
        self._first_failure = self._first_failure or failure
        verdict = self._queue.fail(slot.number, unit)
        tries = self._settings.actors.tries
        _LOG.warning("unit %d failed (%d of %d): %s", unit, verdict.attempts, tries, failure.summary)
        if verdict.give_up:
            raise CaptureError(
                f"{self._files.url}: expected units to be captured, found that all {self._figures.failures} attempts "
                f"failed; look at the first failure, then run the command again:\n  {self._first_failure.summary}"
            ) from self._first_failure.error
        self._set_aside(verdict, failure.build_record())
        if verdict.restart_actor and self._queue.has_units:
            _LOG.warning("the actor on %s failed repeatedly and is restarted", slot.host)
            self._queue.remove(slot.number)
            self._pool.restart(slot)

    def _end_lost_unit(self, slot: Slot, error: RayError) -> None:
        """The actor or its machine is gone; Ray restarts the actor wherever there is room."""
        self._figures.actor_losses += 1
        verdict = self._queue.lose(slot.number)
        _LOG.warning("actor lost with unit %s (%s); its units go back", verdict.unit, type(error).__name__)
        self._pool.set_back(slot, _WAIT_SECONDS)
        self._set_aside(verdict, f"its actor dies every time: {error}"[:4000])

    def _set_aside(self, verdict: Verdict, record: str) -> None:
        """Quarantine a unit, if that is the verdict."""
        if not verdict.set_aside or verdict.unit is None:
            return
        if verdict.unit in self._retried:
            self._files.delete(build_quarantine_path(verdict.unit))  # what an earlier run found out
        quarantine_unit(self._files, QuarantinedUnit(unit=verdict.unit, attempts=verdict.attempts, error=record))
        self._figures.quarantined += 1
        _LOG.error("unit %d is set aside after %d attempts: %s", verdict.unit, verdict.attempts, record.split("\n")[0])
