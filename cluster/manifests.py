"""Manifests while a capture runs: readers see the store grow, and its end finds little left to read."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor

from logitstore.errors import LogitStoreError
from logitstore.store.files import StoreFiles
from logitstore.store.manifest import write_manifest

_LOG = logging.getLogger("logitstore.capture")
# A manifest repeats every row of the one before: each is a quarter longer at least, so that all of them together cost a
# few times the last one. Below this many commits, reading them all at the end takes seconds.
MIN_NEW_UNITS = 20_000
_GROWTH = 0.25


class RunningManifests:
    """Writes manifests beside a capture, one at a time, in a thread of its own.

    Args:
        files: the store.
        plan_fingerprint: of its plan.
        units_listed: how many units an earlier manifest lists already, about.
    """

    def __init__(self, files: StoreFiles, plan_fingerprint: str, units_listed: int) -> None:
        self._files, self._plan_fingerprint, self._units_listed = files, plan_fingerprint, units_listed
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="manifest")
        self._writing: Future[None] | None = None

    def write_if_due(self, units_committed: int) -> None:
        """Begin a manifest when many units have been committed since the last one; returns at once."""
        if self._writing is not None and not self._writing.done():
            return
        if units_committed - self._units_listed >= max(MIN_NEW_UNITS, _GROWTH * self._units_listed):
            self._units_listed = units_committed
            self._writing = self._pool.submit(self._write)

    def close(self) -> None:
        """Wait for the manifest that is being written."""
        self._pool.shutdown()
        if self._writing is not None and (error := self._writing.exception()) is not None:
            _LOG.error("writing a manifest while the capture runs failed", exc_info=error)

    def _write(self) -> None:
        try:
            manifest = write_manifest(self._files, self._plan_fingerprint)
        except LogitStoreError as error:  # the capture goes on, and its end writes one
            _LOG.warning("no manifest was written while the capture runs: %s", error)
        else:
            _LOG.info("manifest %d lists %d units", manifest.number, len(manifest.units))
