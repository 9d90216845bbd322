"""One run of a capture and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.connection import connect
from cluster.driver import run_capture as drive_capture
from cluster.report import report_finished_capture
from cluster.settings import ClusterCaptureSettings
from logitstore.settings import Settings
from logitstore.store.files import StoreFiles
from tools.look import build_facts, count_things, format_bytes, format_count, format_seconds
from tools.status_view import render_status
from tools.store_status import StoreStatus, read_status

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cluster.driver import CaptureReport


class CaptureRun(Settings):
    """What one run of a capture did.

    Attributes:
        units_before: committed when it began.
        units_captured, records, positions, bytes, documents, dead_letters: captured by this run.
        failures: attempts that the teacher failed.
        actor_losses: actors or machines that were lost.
        seconds: from the start of the first actor to the last commit.
        positions_per_second: over these seconds, loading of the teacher included.
    """

    units_before: int
    units_captured: int
    records: int
    positions: int
    bytes: int
    documents: int
    dead_letters: int
    failures: int
    actor_losses: int
    seconds: float
    positions_per_second: float


class CaptureSummary(Settings):
    """One run, and where the store stands after it."""

    run: CaptureRun
    store: StoreStatus


def run_capture(
    settings: ClusterCaptureSettings,
    *,
    address: str | None = None,
    retry_quarantined: bool = False,
    extend: bool = False,
    quiet: bool = False,
) -> CaptureSummary:
    """Run a capture on the cluster at an address (this machine for None), and look at the store after it.

    Raises:
        ConfigError, TeacherError, IncompatibleStoreError, OutsideError: see `cluster.driver.run_capture`.
    """
    report = report_finished_capture(settings, retry_quarantined=retry_quarantined, extend=extend)
    if report is None:
        with connect(address):
            report = drive_capture(settings, retry_quarantined=retry_quarantined, extend=extend, quiet=quiet)
    run = _describe_run(report)
    return CaptureSummary(run=run, store=read_status(StoreFiles(settings.store, settings.storage_options)))


def _describe_run(report: CaptureReport) -> CaptureRun:
    figures = report.figures
    return CaptureRun(
        units_before=figures.units_before,
        units_captured=figures.units_captured,
        records=figures.records,
        positions=figures.positions,
        bytes=figures.bytes,
        documents=figures.documents,
        dead_letters=figures.dead_letters,
        failures=figures.failures,
        actor_losses=figures.actor_losses,
        seconds=figures.seconds,
        positions_per_second=figures.mean_positions_per_second,
    )


def render_summary(summary: CaptureSummary) -> list[RenderableType]:
    """What `logitstore capture` shows when it has ended."""
    run = summary.run
    if not run.units_captured:
        this_run = f"nothing was left to do, {count_things(run.units_before, 'unit')} had been committed before"
        if not summary.store.is_complete:
            this_run = "captured nothing"
        return [build_facts([("this run", this_run)]), *render_status(summary.store)]
    facts = [
        ("this run", f"{count_things(run.units_captured, 'unit')}, {count_things(run.records, 'record')}"),
        ("", f"{format_count(run.positions)} positions, {format_bytes(run.bytes)} of shards"),
        ("took", f"{format_seconds(run.seconds)}, {format_count(run.positions_per_second)} positions per second"),
        ("trouble", _describe_trouble(run)),
    ]
    return [build_facts(facts), *render_status(summary.store)]


def _describe_trouble(run: CaptureRun) -> str | None:
    parts = []
    if run.failures:
        parts.append(count_things(run.failures, "failed attempt"))
    if run.actor_losses:
        parts.append(count_things(run.actor_losses, "lost actor"))
    return ", ".join(parts) or None
