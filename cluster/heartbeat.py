"""The driver's word in its store, so that anybody who can read the store can see what the capture is at."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import socket
import threading
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self

from cluster.figures import CaptureFigures
from logitstore.store.files import StoreFiles
from logitstore.store.plan import PLAN_PATH
from logitstore.store.running import RunningCapture, delete_running, read_running, write_running
from logitstore.url_secrets import hide_secrets

_LOG = logging.getLogger("logitstore.capture")
_ERROR_CHARACTERS = 2000


class Heartbeat:
    """Writes `running/<run>.json` now and then, in a thread of its own: use as a context manager around a capture.

    The object goes when the capture ends well, and says why when it does not; one of a driver that was killed stays
    until another capture of the store begins or ends well, or garbage is collected. A word that cannot be written is
    missed and nothing more. Nothing is written before there is a plan, for there is no store.

    Args:
        files: the store.
        figures: read while they change; each number is right, all of them together may be of two moments.
        seconds_between: None writes nothing at all.
    """

    def __init__(self, files: StoreFiles, figures: CaptureFigures, *, seconds_between: float | None) -> None:
        self._files, self._figures, self._seconds = files, figures, seconds_between
        self._run = uuid.uuid4().hex[:16]
        self._started_at = _read_clock()
        self._units_in_flight: Sequence[int] = ()
        self._has_store = self._has_warned = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run_until_stopped, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._seconds is None:
            return
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # the capture's own end is what matters now
            if not self._find_store():
                return
            if error is None:
                delete_running(self._files, self._run)
                self._delete_silent()
            else:
                self._units_in_flight = ()
                write_running(self._files, self._describe("ended", error=_describe_error(error)))

    def update(self, units_in_flight: Sequence[int]) -> None:
        """Take note of the units that are with an actor; the list is kept."""
        self._units_in_flight = units_in_flight

    def _run_until_stopped(self) -> None:
        seconds = self._seconds or 0.0
        while not self._stop.wait(min(1.0, seconds) if not self._has_store else seconds):
            try:
                if not self._has_store and self._find_store():
                    self._delete_silent()
                if self._has_store:
                    write_running(self._files, self._describe(self._figures.phase))
            except Exception as error:  # noqa: BLE001  # a client's own mistake is no reason to fall silent either
                level = logging.DEBUG if self._has_warned else logging.WARNING
                self._has_warned = True
                _LOG.log(level, "'logitstore status' does not hear of this capture: %s", error)

    def _find_store(self) -> bool:
        self._has_store = self._has_store or self._files.exists(PLAN_PATH)
        return self._has_store

    def _delete_silent(self) -> None:
        """Take back what captures left behind that are not at work any more; one that is says its word again."""
        now = _read_clock().timestamp()
        for heard in read_running(self._files):
            if not heard.is_at_work(now):
                delete_running(self._files, heard.capture.run)

    def _describe(
        self, phase: Literal["loading", "capturing", "finishing", "ended"], *, error: str | None = None
    ) -> RunningCapture:
        figures = self._figures
        rates = figures.rates
        return RunningCapture(
            run=self._run,
            host=socket.gethostname(),
            process=os.getpid(),
            started_at=self._started_at,
            written_at=_read_clock(),
            seconds_between=self._seconds or 0.0,
            phase=phase,
            error=error,
            actors_ready=figures.actors_ready,
            actors_wanted=figures.actors_wanted,
            units_in_flight=tuple(sorted(self._units_in_flight)),
            units_captured=figures.units_captured,
            lost_races=figures.lost_races,
            positions=figures.positions,
            failures=figures.failures,
            actor_losses=figures.actor_losses,
            actor_hangs=figures.actor_hangs,
            units_per_second=rates.units if rates else None,
            positions_per_second=rates.positions if rates else None,
        )


def _read_clock() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _describe_error(error: BaseException) -> str:
    """Class and message; without the secrets of URLs, for everybody who can read the store can read this."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, SystemExit):  # what Ray makes of SIGTERM
        return f"stopped by signal {error.code}"
    return hide_secrets(f"{type(error).__name__}: {error}")[:_ERROR_CHARACTERS]
