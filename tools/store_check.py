"""A verification of a store and its repair as one outcome."""

from __future__ import annotations

import os
from collections.abc import Callable

from logitstore.settings import Settings
from logitstore.store.files import StoreFiles
from logitstore.store.manifest import list_manifests
from logitstore.store.repair import repair_store
from logitstore.store.verify import Problem, verify_store


class FoundProblem(Settings):
    """One thing that is wrong; `unit` is None where it is not a unit's."""

    path: str
    what: str
    what_to_do: str
    unit: int | None


class StoreCheck(Settings):
    """What a verification found, and what a repair did about it.

    Attributes:
        store: its address.
        is_quick: whether shards were left unread.
        is_clean: whether nothing was wrong.
        units, units_planned: committed, and planned.
        quarantined: units set aside after too many failures; the store is without them.
        records, positions, bytes: of the units that were found right.
        problems: what was wrong.
        is_repaired: whether a repair was asked for and needed.
        units_to_capture: that the repair took back.
        manifest: number of the newest manifest, None where there is none.
        remaining: what was wrong after the repair still, looked at without reading shards.
    """

    store: str
    is_quick: bool
    is_clean: bool
    units: int
    units_planned: int
    quarantined: int
    records: int
    positions: int
    bytes: int
    problems: tuple[FoundProblem, ...]
    is_repaired: bool
    units_to_capture: tuple[int, ...]
    manifest: int | None
    remaining: tuple[FoundProblem, ...]

    @property
    def is_good(self) -> bool:
        """Whether the store is now without known problems."""
        return self.is_clean or (self.is_repaired and not self.remaining)


def run_verify(
    files: StoreFiles,
    *,
    quick: bool = False,
    repair: bool = False,
    workers: int | None = None,
    report: Callable[[int, int], None] | None = None,
) -> StoreCheck:
    """Verify a store, and repair it where that is asked for and needed.

    Args:
        files: the store.
        quick: read no shard.
        repair: take damaged units back, write a new manifest, and look once more.
        workers: shards checked at once; None for one per core.
        report: called with (units done, units committed).

    Raises:
        StoreNotFoundError, IncompatibleStoreError: there is no store, or it is not readable at all.
    """
    verification = verify_store(files, quick=quick, workers=workers or max(2, os.cpu_count() or 1), report=report)
    is_repaired = repair and not verification.is_clean
    units_to_capture = repair_store(files, verification) if is_repaired else []
    remaining = verify_store(files, quick=True).problems if is_repaired else ()
    numbers = list_manifests(files)
    return StoreCheck(
        store=files.url,
        is_quick=quick,
        is_clean=verification.is_clean,
        units=verification.units,
        units_planned=verification.units_planned,
        quarantined=verification.quarantined,
        records=verification.records,
        positions=verification.positions,
        bytes=verification.bytes,
        problems=tuple(map(_describe, verification.problems)),
        is_repaired=is_repaired,
        units_to_capture=tuple(units_to_capture),
        manifest=numbers[-1] if numbers else None,
        remaining=tuple(map(_describe, remaining)),
    )


def _describe(problem: Problem) -> FoundProblem:
    return FoundProblem(path=problem.path, what=problem.what, what_to_do=problem.what_to_do, unit=problem.unit)
