"""The capture driver: plan, loop, manifest, and no state that a rerun would miss.

Every fact that must survive is a commit or a quarantine record in the store, so the driver may die at any line: run it
again and it lists what is committed and goes on with the rest. What trouble costs (the numbers are in `unit_queue.py`):

- an actor, its node or the machine is gone: its units go back to the front of the queue, for free, and another actor is
  asked for; a machine that says so beforehand is left in order (`draining.py`);
- the teacher failed on a unit: the unit is tried again, elsewhere if possible, and set aside after `tries` failures;
- an actor fails again and again: it is replaced by a new one; one that cannot load any more is dropped;
- the storage failed: the unit waits and is tried again; only storage that stays broken for all ends the capture.
"""

from __future__ import annotations

import contextlib
import logging

from ray.exceptions import RayError

from cluster.capture_loop import CaptureLoop
from cluster.capture_watch import CaptureWatch
from cluster.figures import CaptureFigures
from cluster.manifests import RunningManifests
from cluster.ray_cluster import Cluster, RayCluster
from cluster.report import (
    CaptureReport,
    StoreLook,
    build_report,
    look_at_store,
    read_standing,
    report_finished,
    report_finished_capture,
)
from cluster.settings import ClusterCaptureSettings, make_paths_absolute
from logitstore.errors import LogitStoreError, OutsideError
from logitstore.planning import open_plan
from logitstore.store.files import StoreFiles
from logitstore.store.plan import StorePlan

__all__ = ["CaptureReport", "report_finished_capture", "run_capture"]

_LOG = logging.getLogger("logitstore.capture")


def run_capture(
    settings: ClusterCaptureSettings,
    *,
    retry_quarantined: bool = False,
    extend: bool = False,
    quiet: bool = False,
    cluster: Cluster | None = None,
) -> CaptureReport:
    """Capture whatever of the corpus is not in the store yet. Call inside `cluster.connection.connect`.

    With nothing left to do no actor is started, and the teacher's weights are not compared with the plan's.

    Args:
        settings: the capture. Local paths of store and teacher may be relative to this process's folder.
        retry_quarantined: try units again that an earlier run set aside.
        extend: add corpus files that the store does not have; what it has stays, listed or not.
        quiet: no progress on stderr.
        cluster: where actors run; the one that Ray is connected to by default.
    Raises:
        IncompatibleStoreError: the store was made with other settings, or by another teacher.
        TeacherError, ConfigError: the teacher cannot be loaded, a setting does not fit it, no machine has what an
            actor asks for, or an actor's machine does not see corpus or store.
        CaptureError: nothing could be captured; the message has the first failure.
        OutsideError: storage or cluster stayed broken; what is committed stays, and is in a manifest if possible.
    """
    settings = make_paths_absolute(settings)
    look = look_at_store(settings, extend=extend)
    finished = report_finished(settings, look, retry_quarantined=retry_quarantined)
    if finished is not None:
        return finished
    try:
        driver = _Driver(settings, cluster or RayCluster(), look, quiet=quiet)
        return driver.run(retry_quarantined=retry_quarantined, extend=extend)
    except (RayError, ConnectionError) as error:
        raise OutsideError(
            f"Ray: expected a working cluster, found {type(error).__name__}: {error}; look at the cluster, then run "
            "the command again"
        ) from error


class _Driver:
    _loop: CaptureLoop
    _plan: StorePlan

    def __init__(
        self, settings: ClusterCaptureSettings, cluster: Cluster, look: StoreLook | None, *, quiet: bool
    ) -> None:
        self._settings, self._cluster, self._look = settings, cluster, look
        self._files = StoreFiles(settings.store, settings.storage_options)
        self._figures = CaptureFigures()
        self._watch = CaptureWatch(self._files, settings, self._figures, quiet=quiet)

    def run(self, *, retry_quarantined: bool, extend: bool) -> CaptureReport:
        with self._watch:
            return self._run(retry_quarantined=retry_quarantined, extend=extend)

    def _run(self, *, retry_quarantined: bool, extend: bool) -> CaptureReport:
        look, most = self._look, None
        if look is not None and not look.has_new_files:
            most = len(look.standing.list_to_do(retry_quarantined=retry_quarantined))
        self._loop = CaptureLoop(
            self._settings, self._cluster, self._files, self._figures, self._watch, most_actors=most
        )
        try:
            first = self._loop.load_first()
            self._plan = open_plan(self._files, self._settings, first.identity, extend=extend)
            self._fill_loop(retry_quarantined=retry_quarantined)
            self._capture_units()
        except (LogitStoreError, RayError):
            self._save_manifest()
            raise
        finally:
            self._figures.phase = "finishing"
            self._loop.close()
        return build_report(self._files, self._plan, self._figures)

    def _fill_loop(self, *, retry_quarantined: bool) -> None:
        look = self._look
        # What was committed since somebody looked, another capture has done: that is a race lost, at the cost of a
        # request. A listing of a million units takes a thousand.
        is_known = look is not None and look.plan == self._plan
        standing = look.standing if look is not None and is_known else read_standing(self._files, self._plan)
        to_do = standing.list_to_do(retry_quarantined=retry_quarantined)
        self._loop.fill(to_do, retried=standing.quarantined if retry_quarantined else frozenset())
        standing.fill_figures(self._figures, retry_quarantined=retry_quarantined)
        figures = self._figures
        figures.phase = "capturing"
        _LOG.info("%d units planned, %d committed, %d to do", figures.units_planned, figures.units_before, len(to_do))

    def _capture_units(self) -> None:
        figures = self._figures
        manifests = RunningManifests(self._files, self._plan.compute_fingerprint(), figures.units_before)
        with contextlib.closing(manifests):
            while self._loop.has_units:
                self._loop.step()
                manifests.write_if_due(figures.units_before + figures.units_captured)

    def _save_manifest(self) -> None:
        """So that what is captured can be read although the capture ends in an error."""
        if self._figures.units_captured:
            try:
                build_report(self._files, self._plan, self._figures)
            except LogitStoreError as error:
                _LOG.warning("no manifest was written: %s", error)
