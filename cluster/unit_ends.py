"""What becomes of a unit whose call has ended: committed, failed, or lost with its actor."""

from __future__ import annotations

import contextlib
import logging
import time

from ray.exceptions import RayError

from cluster.capture_watch import CaptureWatch
from cluster.failures import RAISED, ActorFailure, read_failure
from cluster.figures import CaptureFigures
from cluster.pool import ActorPool, EndedCall, Slot
from cluster.progress import describe_seconds
from cluster.suspicion import Suspicions
from cluster.unit_queue import UnitQueue, Verdict
from logitstore.capture import Receipt
from logitstore.errors import CaptureError, IncompatibleStoreError, OutsideError, TeacherLostError
from logitstore.store.commit import Outcome, QuarantinedUnit, build_quarantine_path, quarantine_unit
from logitstore.store.files import StoreFiles
from logitstore.unit_records import UnitCare

_LOG = logging.getLogger("logitstore.capture")
_REST_SECONDS = 1.0
# Half a minute and another attempt at a unit lie between.
_RECORD_TRIES = 5


class UnitEnds:
    """Does what the queue decides: counts, quarantines, replaces actors, ends the capture.

    Args:
        files: the store.
        queue: of the units.
        pool: of the actors.
        figures: of the capture.
        watch: told of every receipt.
        tries: as of `ActorSettings`.
        retried: units that an earlier run set aside, and this one tries again.
    """

    def __init__(
        self,
        files: StoreFiles,
        queue: UnitQueue,
        pool: ActorPool,
        figures: CaptureFigures,
        watch: CaptureWatch,
        *,
        tries: int,
        retried: frozenset[int] = frozenset(),
    ) -> None:
        self._files, self._queue, self._pool, self._figures, self._watch = files, queue, pool, figures, watch
        self._tries, self._retried = tries, retried
        self._suspicions = Suspicions()
        self._first_failure: ActorFailure | None = None
        self._unrecorded_in_a_row = 0

    def find_care(self, unit: int) -> UnitCare | None:
        """How a unit is to be captured; None for the usual way."""
        return self._suspicions.find_care(unit)

    def end(self, call: EndedCall, unit: int) -> None:
        """Take in how a unit's call has ended.

        Raises:
            LogitStoreError: the capture cannot go on.
        """
        slot = call.slot
        try:
            receipt: Receipt = call.fetch()
        except RAISED as error:
            self._end_failed(slot, unit, read_failure(error))
        except RayError as error:
            self._end_lost(slot, error)
        else:
            was_captured = receipt.outcome is Outcome.WON
            self._queue.succeed(slot.number, unit, was_captured=was_captured)
            self._watch.count_receipt(receipt)
            self._suspicions.forget(unit)
            if was_captured:
                slot.restarts_in_a_row = 0
                slot.group.note_unit(receipt.seconds)
            if unit in self._retried:
                with contextlib.suppress(OutsideError):  # beside a commit the record means nothing
                    self._files.delete(build_quarantine_path(unit))

    def end_hanging(self, slot: Slot, unit: int, seconds: float) -> None:
        """An actor has been at a unit for too long: it is given up, and replaced after a rest.

        Raises:
            LogitStoreError: the capture cannot go on.
        """
        self._figures.actor_losses += 1
        self._figures.actor_hangs += 1
        verdict = self._queue.lose(slot.number, is_excused=slot.is_retired)
        taken = describe_seconds(seconds)
        _LOG.warning(
            "the actor on %s hangs: it was at unit %d for %s, which goes to others first", slot.host, unit, taken
        )
        self._pool.restart(slot)
        self._set_aside(verdict, f"its actor hangs every time, for {taken} last")

    def _end_failed(self, slot: Slot, unit: int, failure: ActorFailure) -> None:
        """The actor lives and reports an error."""
        _LOG.debug("unit %d failed on %s:\n%s", unit, slot.host, failure.traceback)
        if isinstance(failure.error, IncompatibleStoreError):
            raise failure.error
        settings_error = failure.build_settings_error()
        if settings_error is not None:
            raise settings_error from failure.error
        if isinstance(failure.error, TeacherLostError):
            self._end_dead_engine(slot, unit, failure.error)
        elif isinstance(failure.error, OutsideError):
            verdict = self._queue.fail_outside(slot.number, unit, now=time.monotonic())
            _LOG.warning("unit %d waits: %s", unit, failure.summary)
            if verdict.give_up:
                raise failure.error
            self._set_aside(verdict, failure.build_record())
        else:
            self._end_with_failure(slot, unit, failure)

    def _end_with_failure(self, slot: Slot, unit: int, failure: ActorFailure) -> None:
        self._figures.failures += 1
        self._first_failure = self._first_failure or failure
        verdict = self._queue.fail(slot.number, unit)
        _LOG.warning("unit %d failed (%d of %d): %s", unit, verdict.attempts, self._tries, failure.summary)
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

    def _end_dead_engine(self, slot: Slot, unit: int, error: TeacherLostError) -> None:
        """The actor lives, its engine does not; see `suspicion.py`."""
        self._figures.actor_losses += 1
        is_explained = self._suspicions.note_death(unit, error)
        verdict = self._queue.lose(slot.number, is_excused=is_explained)
        _LOG.warning("engine lost with unit %d; the actor on %s is restarted: %s", unit, slot.host, error)
        self._pool.restart(slot)
        self._set_aside(verdict, f"the teacher's engine dies every time: {error}"[:4000])

    def _end_lost(self, slot: Slot, error: RayError) -> None:
        """The actor or its machine is gone; another is started wherever there is room."""
        self._figures.actor_losses += 1
        is_excused = slot.is_retired or getattr(error, "preempted", False)
        verdict = self._queue.lose(slot.number, is_excused=is_excused)
        _LOG.warning("actor lost with unit %s (%s); its units go back", verdict.unit, type(error).__name__)
        self._pool.set_back(slot, _REST_SECONDS)
        self._set_aside(verdict, f"its actor dies every time: {error}"[:4000])

    def _set_aside(self, verdict: Verdict, record: str) -> None:
        """Quarantine a unit, if that is the verdict; where storage fails just then, the unit is tried once more."""
        if not verdict.set_aside or verdict.unit is None:
            return
        entry = QuarantinedUnit(unit=verdict.unit, attempts=verdict.attempts, error=record)
        try:
            if entry.unit in self._retried:
                self._files.delete(build_quarantine_path(entry.unit))  # what an earlier run found out
            quarantine_unit(self._files, entry)
        except OutsideError as error:
            self._unrecorded_in_a_row += 1
            if self._unrecorded_in_a_row >= _RECORD_TRIES:
                raise
            _LOG.warning("unit %d waits, since it cannot be set aside: %s", entry.unit, error)
            self._queue.put_off(entry.unit, now=time.monotonic())
            return
        self._unrecorded_in_a_row = 0
        self._figures.quarantined += 1
        _LOG.error("unit %d is set aside after %d attempts: %s", verdict.unit, verdict.attempts, record.split("\n")[0])
