"""What becomes of an actor whose load has ended: ready, to be tried again, or dropped.

Trouble that may pass (a hub that is down, storage that does not answer) is waited out: the place rests, longer each
time, up to a minute, and another actor tries again, for as long as others are at work. The capture ends with that
trouble when nobody is ready for ten minutes and it goes on. What does not pass (settings, weights that cannot be read)
drops the actor for good, and ends the capture where nobody has loaded yet. So does a process that dies in the middle of
loading for the fourth time in a row, as it does on a machine without enough memory.
"""

from __future__ import annotations

import logging
import time
from enum import Enum

from ray.exceptions import RayError

from cluster.actor import LoadedTeacher
from cluster.failures import RAISED, read_failure
from cluster.figures import CaptureFigures
from cluster.pool import ActorPool, EndedCall, Slot
from cluster.settings import ClusterCaptureSettings
from logitstore.errors import IncompatibleStoreError, LogitStoreError, OutsideError

_LOG = logging.getLogger("logitstore.capture")
LOAD_TRIES = 4
PATIENCE_SECONDS = 600.0
LONGEST_REST_SECONDS = 60.0
_REST_SECONDS = 1.0


class LoadEnd(Enum):
    """What to do with the actor's place."""

    READY = "ready"
    RESTS = "rests"
    DROPPED = "dropped"


class LoadEnds:
    """Decides about actors that have loaded, or could not.

    Args:
        settings: of the capture.
        pool: of the actors.
        figures: of the capture.
    Attributes:
        first: the teacher that loaded first, which all others have to be.
        last_drop: why the last of those that were dropped could not load.
    """

    def __init__(self, settings: ClusterCaptureSettings, pool: ActorPool, figures: CaptureFigures) -> None:
        self._settings, self._pool, self._figures = settings, pool, figures
        self._failing_since: float | None = None  # with nobody ready
        self.first: LoadedTeacher | None = None
        self.last_drop: LogitStoreError | None = None

    @property
    def is_failing(self) -> bool:
        """Whether nobody is ready because of trouble that may pass."""
        return self._failing_since is not None

    def end(self, call: EndedCall) -> LoadEnd:
        """Take in how a load has ended.

        Raises:
            LogitStoreError: the capture cannot go on.
        """
        slot = call.slot
        try:
            loaded: LoadedTeacher = call.fetch()
        except RAISED as error:
            failure = read_failure(error)
            _LOG.debug("load failed on %s:\n%s", failure.host, failure.traceback)
            load_error = failure.build_load_error(self._settings.teacher.model)
            if isinstance(load_error, OutsideError):
                return self._rest(slot, load_error, failure.host)
            return self._drop(slot, load_error)
        except RayError as error:
            return self._end_lost(slot, error)
        self._admit(slot, loaded)
        return LoadEnd.READY

    def _end_lost(self, slot: Slot, error: RayError) -> LoadEnd:
        self._figures.actor_losses += 1
        self._pool.set_back(slot, _REST_SECONDS)
        slot.load_losses += not getattr(error, "preempted", False)
        if slot.load_losses < LOAD_TRIES:
            return LoadEnd.RESTS
        text = (
            f"a capture actor died {slot.load_losses} times while it loaded the teacher, last with {error}; look for "
            "lack of memory on its machine, or set actors.load_seconds to more"
        )
        return self._drop(slot, OutsideError(text))

    def _admit(self, slot: Slot, loaded: LoadedTeacher) -> None:
        """Two machines with two teachers end the capture: which one is right, only a person knows."""
        if self.first is None:
            self.first = loaded
        writes_answers = self._settings.generate is not None
        differences = self.first.identity.differences(loaded.identity, writes_answers=writes_answers)
        if differences:
            raise IncompatibleStoreError(
                f"the actors on {self.first.host} and {loaded.host} loaded different teachers; give every "
                "machine the same files:\n  " + "\n  ".join(differences)
            )
        self._failing_since = None
        self._pool.admit(slot, loaded)

    def _rest(self, slot: Slot, error: OutsideError, host: str) -> LoadEnd:
        """It may pass: wait, and try again; while somebody is at work, for as long as it takes."""
        now = time.monotonic()
        slot.load_failures += 1
        if self._pool.num_ready:
            self._failing_since = None
        elif self._failing_since is None:
            self._failing_since = now
        elif now - self._failing_since >= PATIENCE_SECONDS and slot.load_failures >= LOAD_TRIES:
            raise error
        seconds = min(LONGEST_REST_SECONDS, 2.0 ** min(slot.load_failures, 10))
        _LOG.warning("the actor on %s cannot load yet, and tries again in %.0f s: %s", host, seconds, error)
        self._pool.set_back(slot, seconds)
        return LoadEnd.RESTS

    def _drop(self, slot: Slot, error: LogitStoreError) -> LoadEnd:
        """An actor cannot load: go on without it, unless it is the only one or nobody has loaded yet."""
        slot.group.dropped += 1
        self.last_drop = error
        is_final = self.first is None and not isinstance(error, OutsideError)
        num_left = len(self._pool.slots) - 1
        if is_final or not num_left:
            raise error
        _LOG.error("an actor is dropped, %d are left: %s", num_left, error)
        return LoadEnd.DROPPED
