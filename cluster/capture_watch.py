"""Everything by which a capture is watched: its progress here, its word in the store, its figures for Prometheus."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Self

from cluster.figures import CaptureFigures
from cluster.heartbeat import Heartbeat
from cluster.metrics import DriverMetrics
from cluster.progress import CaptureProgress
from cluster.settings import ClusterCaptureSettings
from logitstore.capture import Receipt
from logitstore.store.files import StoreFiles

# The driver comes round thousands of times a second; nobody sees more than a few.
_SECONDS_BETWEEN_UPDATES = 0.2


class CaptureWatch:
    """Shows the figures of a capture while they change: use as a context manager around all that it does."""

    def __init__(
        self, files: StoreFiles, settings: ClusterCaptureSettings, figures: CaptureFigures, *, quiet: bool
    ) -> None:
        self._figures = figures
        self._heartbeat = Heartbeat(files, figures, seconds_between=settings.heartbeat_seconds)
        self._metrics = DriverMetrics(settings.store, figures)
        self._progress = CaptureProgress(figures, quiet=quiet)
        self._next_update = 0.0
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Self:
        for part in (self._heartbeat, self._metrics, self._progress):
            self._exits.enter_context(part)
        return self

    def __exit__(self, *error: object) -> None:
        self._exits.__exit__(*error)  # type: ignore[arg-type]  # as it came

    def count_receipt(self, receipt: Receipt) -> None:
        """Take in what a unit brought."""
        self._figures.count_receipt(receipt)
        self._metrics.count(receipt)

    @property
    def is_due(self) -> bool:
        """Whether it is time to bring the figures up to date and call `update`."""
        return time.monotonic() >= self._next_update

    def update(self, units_in_flight: Sequence[int]) -> None:
        """Show the figures as they are now."""
        self._next_update = time.monotonic() + _SECONDS_BETWEEN_UPDATES
        self._heartbeat.update(units_in_flight)
        self._metrics.update()
        self._progress.update()
