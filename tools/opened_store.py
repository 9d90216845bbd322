"""Opens a store to look at it: at the manifest asked for, or as it is at this moment."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from logitstore.errors import CorruptShardError, IncompatibleStoreError
from logitstore.store.commit import COMMITS, UnitListing, list_unit_files, read_commits
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import Manifest, list_manifests, read_manifest, take_snapshot
from logitstore.store.plan import check_units_are_planned, read_plan
from tools.look import count_things


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedStore:
    """A store, and the newest manifest that lists what it shows.

    Attributes:
        store: opened for reading.
        files: its files.
        commits: the listing of its commits.
        manifest: number of the manifest that lists exactly these records, None where there is none (yet).
        newer_units: committed units that the newest manifest does not list.
        unreadable: what is damaged and left out, a line each; see `open_readable`.
    """

    store: LogitStore
    files: StoreFiles
    commits: UnitListing
    manifest: int | None
    newer_units: int
    unreadable: tuple[str, ...] = ()


def open_store(url: str, manifest: int | None) -> OpenedStore:
    """Open a store at a manifest, or as it is at this moment, also while a capture runs.

    Raises:
        StoreNotFoundError, IncompatibleStoreError, CorruptShardError: there is no store, or it cannot be read.
    """
    files = StoreFiles(url)
    if manifest is not None:
        store = LogitStore.open(url, manifest)
        commits = list_unit_files(files, COMMITS)
        return OpenedStore(store=store, files=files, commits=commits, manifest=manifest, newer_units=0)
    plan = read_plan(files)
    fingerprint = plan.compute_fingerprint()
    numbers = list_manifests(files)
    newest = read_manifest(files, numbers[-1]) if numbers else None
    listing = list_unit_files(files, COMMITS)
    listed = np.zeros(0, np.int64) if newest is None else newest.units
    # A snapshot reads young commits once more, which takes a request for each. What the newest manifest lists is shown
    # as it lists it, which is what readers of the store see.
    is_listed = newest is not None and newest.plan_fingerprint == fingerprint and np.array_equal(listed, listing.units)
    snapshot = newest if is_listed else take_snapshot(files, fingerprint, newest, listing=listing)
    assert snapshot is not None
    check_units_are_planned(files.url, plan, snapshot.units)
    return OpenedStore(
        store=LogitStore(files, plan, snapshot),
        files=files,
        commits=listing,
        manifest=snapshot.number,
        newer_units=len(np.setdiff1d(listing.units, listed)),
    )


def open_readable(url: str, manifest: int | None) -> OpenedStore:
    """As `open_store`; of a damaged store whatever is whole: the newest manifest that can be read, and newer commits.

    Raises:
        StoreNotFoundError, IncompatibleStoreError, CorruptShardError: there is no store, or its plan, without which
            nothing can be told, or the manifest asked for is damaged.
    """
    try:
        return open_store(url, manifest)
    except CorruptShardError:
        if manifest is not None:
            raise
    files = StoreFiles(url)
    plan = read_plan(files)
    fingerprint = plan.compute_fingerprint()
    unreadable: list[str] = []
    whole = _find_whole_manifest(files, unreadable)
    listed = np.zeros(0, np.int64) if whole is None else whole.units
    commits = list_unit_files(files, COMMITS)
    newer = np.setdiff1d(commits.units, listed)
    damaged = [unit for unit in newer.tolist() if not _is_whole_commit(files, unit, fingerprint, unreadable)]
    snapshot = take_snapshot(files, fingerprint, whole, without=damaged)
    return OpenedStore(
        store=LogitStore(files, plan, snapshot),
        files=files,
        commits=commits,
        manifest=whole.number if whole is not None and whole.lists_the_same(snapshot) else None,
        newer_units=len(newer) - len(damaged),
        unreadable=tuple(unreadable),
    )


def _find_whole_manifest(files: StoreFiles, unreadable: list[str]) -> Manifest | None:
    for number in reversed(list_manifests(files)):
        try:
            return read_manifest(files, number)
        except (CorruptShardError, IncompatibleStoreError) as error:
            unreadable.append(str(error))
    return None


def _is_whole_commit(files: StoreFiles, unit: int, fingerprint: str, unreadable: list[str]) -> bool:
    try:
        list(read_commits(files, np.array([unit]), fingerprint))
    except (CorruptShardError, IncompatibleStoreError) as error:
        unreadable.append(str(error))
        return False
    return True


def describe_manifest(manifest: int | None, newer_units: int) -> str:
    """Which manifest is shown, for people."""
    if manifest is not None:
        return str(manifest)
    if newer_units:
        return f"none lists it yet: as committed now, {count_things(newer_units, 'unit')} newer than the last manifest"
    return "none lists it: as committed now"
