"""What a store holds that belongs to nothing: shards of lost or killed attempts, unfinished writes, last words."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from logitstore.errors import CorruptShardError
from logitstore.store.commit import COMMITS, DATA, QUARANTINE, list_unit_files, read_commits
from logitstore.store.files import StoredFile, StoreFiles
from logitstore.store.manifest import list_manifests, read_manifest
from logitstore.store.plan import read_plan
from logitstore.store.running import RUNNING

DEFAULT_GRACE_SECONDS = 24 * 3600.0
_PROBES = "probe"


@dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """One object that nothing refers to; `path` is relative to the store."""

    path: str
    bytes: int


def find_garbage(
    files: StoreFiles, *, grace_seconds: float = DEFAULT_GRACE_SECONDS, now: float | None = None
) -> list[Garbage]:
    """What is older than the grace period and belongs to nothing, by path.

    That is: data files that no commit and no manifest names, what killed writes left on a local file system, probes,
    and what captures that are long over said of themselves. A running capture uploads a shard before it commits it: the
    grace period keeps those. An object of unknown age is kept.

    Raises:
        StoreNotFoundError: there is no store.
        CorruptShardError: a manifest or commit is damaged. What it keeps alive is unknown, so nothing is garbage until
            `repair_store` has removed it.
        IncompatibleStoreError: a program with another format version has written to the store.
    """
    fingerprint = read_plan(files).compute_fingerprint()
    before = (time.time() if now is None else now) - grace_seconds
    shards = {shard.path: shard for shard in _select_old(DATA, files.list(DATA), before)}
    garbage = [found for folder in (_PROBES, RUNNING) for found in _select_old(folder, files.list(folder), before)]
    for folder in ("", COMMITS, DATA, QUARANTINE, RUNNING, _PROBES):
        garbage += _select_old(folder, files.list_leftovers(folder), before)
    if shards:
        for path in _iterate_referenced(files, fingerprint):
            shards.pop(path, None)
    return sorted([*garbage, *shards.values()], key=lambda item: item.path)


def delete_garbage(files: StoreFiles, garbage: list[Garbage]) -> None:
    """Delete what `find_garbage` found."""
    for item in garbage:
        files.delete(item.path)


def _select_old(folder: str, listed: Sequence[StoredFile], before: float) -> list[Garbage]:
    prefix = f"{folder}/" if folder else ""
    return [
        Garbage(path=f"{prefix}{file.name}", bytes=file.bytes)
        for file in listed
        if file.modified is not None and file.modified < before
    ]


def _iterate_referenced(files: StoreFiles, fingerprint: str) -> Iterator[str]:
    """Data files that a commit or a manifest names, some more than once; a pinned manifest must stay readable."""
    for commit in read_commits(files, list_unit_files(files, COMMITS).units, fingerprint):
        if commit.file is not None:
            yield commit.file
    for number in list_manifests(files):
        try:
            manifest = read_manifest(files, number)
        except CorruptShardError as error:
            raise CorruptShardError(
                f"{error}, which removes it: until then nobody knows which files it lists, and nothing is deleted"
            ) from None
        for units in manifest.iterate_units("file"):
            yield from units["file"].drop_null().to_pylist()
