"""Opens a store to look at it: at the manifest asked for, or as it is at this moment."""

from __future__ import annotations

from dataclasses import dataclass

from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import list_manifests, read_manifest
from tools.look import count_things


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedStore:
    """A store, and the newest manifest that lists what it shows.

    Attributes:
        store: opened for reading.
        files: its files.
        manifest: number of the manifest that lists exactly these records, None where there is none (yet).
        newer_units: committed units that the newest manifest does not list.
    """

    store: LogitStore
    files: StoreFiles
    manifest: int | None
    newer_units: int


def open_store(url: str, manifest: int | None) -> OpenedStore:
    """Open a store at a manifest, or as it is at this moment, also while a capture runs.

    Raises:
        StoreNotFoundError, IncompatibleStoreError, CorruptShardError: there is no store, or it cannot be read.
    """
    files = StoreFiles(url)
    if manifest is not None:
        return OpenedStore(store=LogitStore.open(url, manifest), files=files, manifest=manifest, newer_units=0)
    live = LogitStore.open(url, "live")
    committed = set(live.manifest.units.tolist())
    numbers = list_manifests(files)
    if not numbers:
        return OpenedStore(store=live, files=files, manifest=None, newer_units=len(committed))
    newest = read_manifest(files, numbers[-1])
    is_listed = newest.lists_the_same(live.manifest)
    newer_units = len(committed - set(newest.units.tolist()))
    return OpenedStore(store=live, files=files, manifest=numbers[-1] if is_listed else None, newer_units=newer_units)


def describe_manifest(manifest: int | None, newer_units: int) -> str:
    """Which manifest is shown, for people."""
    if manifest is not None:
        return str(manifest)
    if newer_units:
        return f"none lists it yet: as committed now, {count_things(newer_units, 'unit')} newer than the last manifest"
    return "none lists it: as committed now"
