"""The capture actor: one loaded teacher that captures the units it is given."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass

import ray

from cluster.metrics import ActorMetrics
from cluster.preemption import watch_for_notice
from cluster.settings import ClusterCaptureSettings
from cluster.time_limit import limit_seconds
from logitstore.capture import Receipt, UnitCapture
from logitstore.errors import TeacherLostError
from logitstore.store.files import StoreFiles
from logitstore.store.plan import read_plan
from logitstore.teacher.loading import load_teacher
from logitstore.teacher.protocol import Teacher, TeacherIdentity
from logitstore.unit_records import UnitCare
from logitstore.unit_sequences import SequenceMaker

_LOG = logging.getLogger("logitstore.capture")


@dataclass(frozen=True, kw_only=True)
class LoadedTeacher:
    """Who an actor has loaded, and where: `node_ids` are Ray's names of the machines that it cannot do without."""

    identity: TeacherIdentity
    host: str
    process: int
    node_ids: tuple[str, ...] = ()


# The driver starts another one for one that is lost: a call to an actor that Ray is about to restart ends in an error,
# one to an actor that has yet to be placed waits.
@ray.remote(max_restarts=0, max_task_retries=0)
class CaptureActor:
    """Holds a teacher, on one machine or, through a placement group, on several."""

    def __init__(self, settings: ClusterCaptureSettings) -> None:
        self._settings = settings
        self._teacher: Teacher | None = None
        self._capture: UnitCapture | None = None
        self._loss: TeacherLostError | None = None
        self._metrics = ActorMetrics(settings.store)
        if settings.actors.notice is not None:
            watch_for_notice(settings.actors.notice)

    def load(self) -> LoadedTeacher:
        """Load the teacher, or say again that it is loaded."""
        identity = self._load_teacher().identity
        return LoadedTeacher(
            identity=identity, host=socket.gethostname(), process=os.getpid(), node_ids=_find_machines()
        )

    def capture(self, unit: int, attempt: str, care: UnitCare | None = None) -> Receipt:
        """Capture one unit of the store's plan and commit it; see `UnitCapture.capture`.

        Raises:
            TeacherLostError: the teacher's engine has died, under this unit or before. Ray takes an actor that raises
                for a living one: whoever asked restarts it.
        """
        if self._loss is not None:
            raise TeacherLostError(str(self._loss))  # without the document, which was another unit's
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
            receipt = self._capture.capture(unit, attempt, care)
        except TeacherLostError as error:
            _LOG.error("%s", error)
            self._loss = error
            raise
        self._metrics.count(receipt)
        return receipt

    def _load_teacher(self) -> Teacher:
        if self._teacher is None:
            settings = self._settings
            with limit_seconds(settings.actors.load_seconds):
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


def _find_machines() -> tuple[str, ...]:
    """This process's machine, and those of its placement group."""
    machines = {ray.get_runtime_context().get_node_id()}
    group = ray.util.get_current_placement_group()
    if group is not None:
        machines.update(ray.util.placement_group_table(group)["bundles_to_node_id"].values())
    return tuple(sorted(machines))
