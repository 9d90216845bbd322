"""What a capture hands back, also the one that finds nothing left to do."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.figures import CaptureFigures
from cluster.settings import ClusterCaptureSettings
from logitstore.errors import StoreNotFoundError
from logitstore.planning import find_new_files
from logitstore.store.commit import COMMITS, QUARANTINE, list_units
from logitstore.store.files import StoreFiles
from logitstore.store.manifest import write_manifest
from logitstore.store.plan import StorePlan, read_plan


@dataclass(frozen=True, kw_only=True)
class CaptureReport:
    """What one run of a capture did, and where the store stands after it."""

    figures: CaptureFigures
    manifest_number: int | None
    quarantined_units: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StandingUnits:
    """Units of a plan by where they stand; none is in two sets."""

    planned: range
    committed: frozenset[int]
    quarantined: frozenset[int]

    def list_to_do(self, *, retry_quarantined: bool) -> list[int]:
        """Units to capture, ascending."""
        skipped = self.committed if retry_quarantined else self.committed | self.quarantined
        return [unit for unit in self.planned if unit not in skipped]

    def fill_figures(self, figures: CaptureFigures, *, retry_quarantined: bool) -> None:
        """Write down where a run starts."""
        figures.units_planned = len(self.planned)
        figures.units_before = len(self.committed)
        figures.quarantined = 0 if retry_quarantined else len(self.quarantined)


def read_standing(files: StoreFiles, plan: StorePlan) -> StandingUnits:
    """Where the units of a store stand: two listings."""
    planned = range(len(plan.build_unit_table()))
    committed = frozenset(list_units(files, COMMITS)) & frozenset(planned)
    quarantined = frozenset(list_units(files, QUARANTINE)) & frozenset(planned)
    return StandingUnits(planned=planned, committed=committed, quarantined=quarantined - committed)


def build_report(files: StoreFiles, plan: StorePlan, figures: CaptureFigures) -> CaptureReport:
    """Write the manifest and say where the store stands."""
    manifest = write_manifest(files, plan.compute_fingerprint())
    quarantined = tuple(sorted(read_standing(files, plan).quarantined))
    return CaptureReport(figures=figures, manifest_number=manifest.number, quarantined_units=quarantined)


@dataclass(frozen=True, kw_only=True)
class StoreLook:
    """What a store that has a plan looks like to a capture that is about to begin.

    Attributes:
        plan: of the store.
        standing: of its units.
        has_new_files: whether the capture would add corpus files.
    """

    plan: StorePlan
    standing: StandingUnits
    has_new_files: bool


def look_at_store(settings: ClusterCaptureSettings, *, extend: bool = False) -> StoreLook | None:
    """Where a capture would begin; None where there is no store yet.

    Settings and corpus are compared with the store's plan as always. The teacher is not, since it is not loaded.

    Raises:
        IncompatibleStoreError: the store was made with other settings.
        ConfigError, OutsideError: corpus or store cannot be listed.
    """
    files = StoreFiles(settings.store, settings.storage_options)
    try:
        plan = read_plan(files)
    except StoreNotFoundError:
        return None
    new_files = find_new_files(files.url, plan, settings, plan.teacher, extend=extend)
    return StoreLook(plan=plan, standing=read_standing(files, plan), has_new_files=bool(new_files))


def report_finished(
    settings: ClusterCaptureSettings, look: StoreLook | None, *, retry_quarantined: bool = False
) -> CaptureReport | None:
    """The report of a capture that has nothing left to do, without any actor or Ray; None where there is work.

    A finished store is reported as finished even where the settings name another teacher by now.
    """
    if look is None or look.has_new_files or look.standing.list_to_do(retry_quarantined=retry_quarantined):
        return None
    figures = CaptureFigures()
    look.standing.fill_figures(figures, retry_quarantined=retry_quarantined)
    return build_report(StoreFiles(settings.store, settings.storage_options), look.plan, figures)


def report_finished_capture(
    settings: ClusterCaptureSettings, *, retry_quarantined: bool = False, extend: bool = False
) -> CaptureReport | None:
    """`look_at_store`, and `report_finished` of what is seen."""
    return report_finished(settings, look_at_store(settings, extend=extend), retry_quarantined=retry_quarantined)
