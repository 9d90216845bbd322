"""Manifests: numbered, immutable snapshots of the commits, one row per row group. They are what readers open.

Opening a store is then a listing and two reads, of plan and manifest, however many units it has. A training run that
pins a number sees the same records for ever, whatever is captured or repaired later.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa

from logitstore.errors import CorruptShardError, OutsideError, StoreNotFoundError
from logitstore.store.commit import COMMITS, Commit, UnitListing, list_unit_files, read_commits
from logitstore.store.create_only import create_or_read_back
from logitstore.store.files import StoreFiles
from logitstore.store.manifest_file import ManifestFile, select_rows, write_manifest_file
from logitstore.store.manifest_table import SCHEMA, build_tables, merge_tables

# A snapshot takes a while between its listing and its manifest, and storage clocks are coarse: commits that are not
# older than the manifest by this much are read again.
_SNAPSHOT_SECONDS = 600.0
# Digests hashed at a time.
_DIGESTS_AT_A_TIME = 65_536


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """A snapshot of what is committed.

    Attributes:
        number: 1, 2, … as stored; None for a snapshot taken just now and not stored.
        file: its rows: one per row group, ordered by unit and row group; a unit without records has one row with
            `records` 0 and no file.
    """

    number: int | None
    file: ManifestFile

    @property
    def plan_fingerprint(self) -> str:
        """Of the plan whose units these are."""
        return self.file.plan_fingerprint

    def read_row_groups(self, *names: str) -> pa.Table:
        """Some columns of the rows that have records, each in one piece."""
        has_records = self.file.read(["records"])["records"].to_numpy() > 0
        # Column by column: joining the pieces of one holds that one twice.
        return pa.table(
            {name: select_rows(self.file.read([name]), has_records)[name].combine_chunks() for name in names}
        )

    def read_units(self, *names: str) -> pa.Table:
        """Some columns with one row per committed unit, ascending: what is true of the whole unit."""
        return pa.concat_tables(self.iterate_units(*names)).combine_chunks()

    def iterate_units(self, *names: str) -> Iterator[pa.Table]:
        """As `read_units`, some units at a time; at least one table."""
        schema = pa.schema([SCHEMA.field(name) for name in names])
        yield schema.empty_table()
        for table in self.file.iterate([*names, "row_group"]):
            yield select_rows(table, table["row_group"].to_numpy() == 0).select(names)

    @cached_property
    def units(self) -> np.ndarray:
        """[U] int32, the committed units, ascending."""
        units: np.ndarray = self.read_units("unit")["unit"].to_numpy()
        return units

    @cached_property
    def digests(self) -> np.ndarray:
        """[G, 32] uint8, SHA-256 of the bytes of every row group that has records."""
        digests = np.empty((self.file.num_rows, 32), dtype=np.uint8)
        stop = 0
        for table in self.file.iterate(["sha256", "records"]):
            rows = select_rows(table, table["records"].to_numpy() > 0)
            for chunk in rows["sha256"].chunks:
                start, stop = stop, stop + len(chunk)
                data = np.frombuffer(chunk.buffers()[1], np.uint8, 32 * len(chunk), 32 * chunk.offset)
                digests[start:stop] = data.reshape(-1, 32)
        return digests[:stop]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what the records are: plan, and the digest of every row group in order."""
        digest = hashlib.sha256(self.plan_fingerprint.encode())
        for start in range(0, len(self.digests), _DIGESTS_AT_A_TIME):
            digest.update(self.digests[start : start + _DIGESTS_AT_A_TIME].tobytes().hex().encode())
        return digest.hexdigest()

    def lists_the_same(self, other: Manifest) -> bool:
        """Whether two manifests have the same plan and rows, whichever release wrote them."""
        if self.file.data == other.file.data:
            return True
        return self.plan_fingerprint == other.plan_fingerprint and all(
            self.file.read([name]).equals(other.file.read([name])) for name in SCHEMA.names
        )


def build_manifest(
    files: StoreFiles, plan_fingerprint: str, commits: Iterable[Commit], kept: Iterable[pa.Table] = ()
) -> Manifest:
    """Snapshot from commits in order of their units, joined to ordered rows of other units; neither is held."""
    rows = merge_tables(kept, build_tables(commits))
    file = write_manifest_file(rows, plan_fingerprint, f"{files.url}: snapshot of the commits")
    return Manifest(number=None, file=file)


def list_manifests(files: StoreFiles) -> list[int]:
    """Numbers of the stored manifests, ascending."""
    matches = (re.fullmatch(r"manifest-(\d+)\.parquet", file.name) for file in files.list(""))
    return sorted(int(match[1]) for match in matches if match)


def build_manifest_path(number: int) -> str:
    return f"manifest-{number:06d}.parquet"


def read_manifest(files: StoreFiles, number: int | None = None) -> Manifest:
    """A stored manifest; the newest when no number is given.

    Raises:
        StoreNotFoundError: no manifest, or none of that number.
        CorruptShardError: the manifest is damaged.
        IncompatibleStoreError: a program with another format version wrote it.
    """
    if number is None:
        numbers = list_manifests(files)
        if not numbers:
            raise StoreNotFoundError(
                f"{files.url}: expected a manifest, found none: the capture has not finished; run 'logitstore capture' "
                "to the end, or 'logitstore verify --repair' to take a snapshot of what is committed so far"
            )
        number = numbers[-1]
    path = build_manifest_path(number)
    try:
        data = files.read(path)
    except FileNotFoundError:
        raise StoreNotFoundError(
            f"{files.url}: expected manifest {number}, found manifests {list_manifests(files)}"
        ) from None
    file = ManifestFile(data, f"{files.url}/{path}")
    file.check()
    return Manifest(number=number, file=file)


def take_snapshot(
    files: StoreFiles,
    plan_fingerprint: str,
    previous: Manifest | None,
    *,
    recheck: Collection[int] = (),
    without: Collection[int] = (),
    listing: UnitListing | None = None,
) -> Manifest:
    """What is committed now.

    Args:
        files: the store.
        plan_fingerprint: of its plan.
        previous: its units are not read again, but for those whose commit is about as new as this manifest or newer:
            a unit that was taken back and captured again has another commit. None, or one of another plan, reads every
            commit.
        recheck: units whose commits are read again in any case.
        without: units to leave out, committed or not.
        listing: of the commits, where the caller has one already; with a million of them it takes a minute.
    Raises:
        CorruptShardError, IncompatibleStoreError: a commit is damaged, or belongs to another plan or format version.
    """
    listing = listing or list_unit_files(files, COMMITS)
    units = np.setdiff1d(listing.units, np.array(list(without), np.int64))
    if previous is None or previous.plan_fingerprint != plan_fingerprint:
        return build_manifest(files, plan_fingerprint, read_commits(files, units, plan_fingerprint))
    known = np.setdiff1d(_find_unchanged(files, previous, listing), np.array(list(recheck), np.int64))
    new = np.setdiff1d(units, known)
    known = np.intersect1d(units, known)
    if not len(new) and np.array_equal(known, previous.units):
        return replace(previous, number=None)
    kept = (select_rows(table, np.isin(table["unit"].to_numpy(), known)) for table in previous.file.iterate())
    return build_manifest(files, plan_fingerprint, read_commits(files, new, plan_fingerprint), kept)


def _find_unchanged(files: StoreFiles, manifest: Manifest, listing: UnitListing) -> np.ndarray:
    """Committed units of a manifest that were certainly not captured again; all of them where no times are told."""
    is_listed = np.isin(listing.units, manifest.units)
    times = {file.name: file.modified for file in files.list("")}
    written = times.get(build_manifest_path(manifest.number)) if manifest.number is not None else None
    is_old = True if written is None else listing.modified < written - _SNAPSHOT_SECONDS
    unchanged: np.ndarray = listing.units[is_listed & is_old]
    return unchanged


def write_manifest(
    files: StoreFiles,
    plan_fingerprint: str,
    recheck: Collection[int] = (),
    *,
    rebuild: bool = False,
    without: Collection[int] = (),
) -> Manifest:
    """Store a snapshot of the commits under the next number; nothing is written when nothing has changed.

    Args:
        files: the store.
        plan_fingerprint: of its plan.
        recheck: units whose commits are read again, such as those that the caller has just captured.
        rebuild: read every commit again and take nothing over from an earlier manifest.
        without: units to leave out, though they are committed; for a repair that is about to take them back.
    Raises:
        CorruptShardError, IncompatibleStoreError: a commit is damaged, or belongs to another plan or format version.
        OutsideError: the storage failed.
    """
    for _ in range(10):
        numbers = list_manifests(files)
        previous = _read_previous(files, numbers, plan_fingerprint)
        start = None if rebuild else previous
        snapshot = take_snapshot(files, plan_fingerprint, start, recheck=recheck, without=without)
        if previous is not None and snapshot.lists_the_same(previous):
            return previous
        number = (numbers[-1] if numbers else 0) + 1
        if create_or_read_back(files, build_manifest_path(number), snapshot.file.data):
            return replace(snapshot, number=number)
    raise OutsideError(f"{files.url}: could not write a manifest: others kept writing; run the command again")


def _read_previous(files: StoreFiles, numbers: Sequence[int], plan_fingerprint: str) -> Manifest | None:
    """The newest manifest as a starting point; a damaged one is rebuilt from the commits instead."""
    if not numbers:
        return None
    try:
        previous = read_manifest(files, numbers[-1])
    except CorruptShardError:
        return None
    return previous if previous.plan_fingerprint == plan_fingerprint else None
