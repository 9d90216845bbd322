"""The capture actor: one loaded teacher that captures the units it is given."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass

import ray

from cluster.metrics import ActorMetrics
from cluster.settings import ClusterCaptureSettings
from logitstore.capture import Receipt, UnitCapture
from logitstore.errors import TeacherLostError
from logitstore.store.files import StoreFiles
from logitstore.store.plan import read_plan
from logitstore.teacher.loading import load_teacher
from logitstore.teacher.protocol import Teacher, TeacherIdentity
from logitstore.unit_sequences import SequenceMaker

_LOG = logging.getLogger("logitstore.capture")


@dataclass(frozen=True, kw_only=True)
class LoadedTeacher:
    """Who an actor has loaded, and where."""

    identity: TeacherIdentity
    host: str
    process: int


@ray.remote(max_restarts=-1, max_task_retries=0)
class CaptureActor:
    """Loads the teacher on first use, so that a restarted actor is as good as a new one."""

    def __init__(self, settings: ClusterCaptureSettings) -> None:
        self._settings = settings
        self._teacher: Teacher | None = None
        self._capture: UnitCapture | None = None
        self._metrics = ActorMetrics(settings.store)

    def load(self) -> LoadedTeacher:
        """Load the teacher, or say again that it is loaded."""
        identity = self._load_teacher().identity
        return LoadedTeacher(identity=identity, host=socket.gethostname(), process=os.getpid())

    def capture(self, unit: int, attempt: str) -> Receipt:
        """Capture one unit of the store's plan and commit it; see `UnitCapture.capture`."""
        if self._capture is None:
            files = StoreFiles(self._settings.store, self._settings.storage_options)
            self._capture = UnitCapture(
                files,
                read_plan(files),
                self._load_teacher(),
                self._settings.corpus,
                storage_options=self._settings.storage_options,
            )
        try:
            receipt = self._capture.capture(unit, attempt)
        except TeacherLostError as error:
            # Ray restarts a process that has ended; one that raises would be asked again, with its engine dead.
            _LOG.error("%s", error)
            os._exit(1)
        self._metrics.count(receipt)
        return receipt

    def _load_teacher(self) -> Teacher:
        if self._teacher is None:
            settings = self._settings
            teacher = load_teacher(
                settings.teacher,
                settings.method,
                settings.sequences.length,
                generate=settings.generate,
            )
            # Whoever loads first speaks for the plan: what this teacher cannot do is refused before there is one.
            SequenceMaker(
                teacher,
                chat=settings.corpus.chat,
                sequences=settings.sequences,
                generate=settings.generate,
                seed=settings.seed,
                has_given_ids=settings.corpus.given_ids is not None,
            )
            self._teacher = teacher
        return self._teacher
