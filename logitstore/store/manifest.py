"""Manifests: numbered, immutable snapshots of the commits, one row per row group. They are what readers open.

Opening a store is then a listing and two reads, of plan and manifest, however many units it has: about 35 bytes stored
and 200 in memory per row group. A training run that pins a number sees the same records for ever, whatever is captured
or repaired later.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from logitstore.errors import CorruptShardError, IncompatibleStoreError, OutsideError, StoreNotFoundError
from logitstore.shard.layout import FORMAT_VERSION
from logitstore.store.commit import COMMITS, Commit, build_commit_path, list_unit_files, parse_commit
from logitstore.store.create_only import create_or_read_back
from logitstore.store.files import StoredFile, StoreFiles
from logitstore.store.manifest_table import SCHEMA, UNIT_FIELDS, build_table

_METADATA_KEY = b"logitstore_manifest"
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
        plan_fingerprint: of the plan whose units these are.
        table: one row per row group, ordered by unit and row group; a unit without records has one row with
            `records` 0 and no file.
    """

    number: int | None
    plan_fingerprint: str
    table: pa.Table

    @cached_property
    def row_groups(self) -> pa.Table:
        """The rows that have records."""
        has_records = pc.greater(self.table["records"], 0)
        return self.table if pc.all(has_records).as_py() else self.table.filter(has_records).combine_chunks()

    @cached_property
    def units(self) -> np.ndarray:
        """[U] int32, the committed units, ascending."""
        return self.per_unit["unit"].to_numpy()  # type: ignore[no-any-return]  # pyarrow is untyped

    @property
    def digests(self) -> np.ndarray:
        """[G, 32] uint8, SHA-256 of the bytes of every row group that has records."""
        column = self.row_groups["sha256"].combine_chunks()
        if not len(column):
            return np.empty((0, 32), dtype=np.uint8)
        return np.frombuffer(column.buffers()[1], np.uint8, 32 * len(column), 32 * column.offset).reshape(-1, 32)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what the records are: plan, and the digest of every row group in order."""
        digest = hashlib.sha256(self.plan_fingerprint.encode())
        digests = self.digests
        for start in range(0, len(digests), _DIGESTS_AT_A_TIME):
            digest.update(digests[start : start + _DIGESTS_AT_A_TIME].tobytes().hex().encode())
        return digest.hexdigest()

    @cached_property
    def per_unit(self) -> pa.Table:
        """One row per committed unit, ascending, with what is true of the whole unit."""
        first = self.table.filter(pc.equal(self.table["row_group"], 0))
        return first.select(["unit", "source", *(field.name for field in UNIT_FIELDS)]).combine_chunks()


def build_manifest(plan_fingerprint: str, commits: Iterable[Commit], kept: pa.Table | None = None) -> Manifest:
    """Snapshot from commits, in any order, joined to the rows kept of an earlier snapshot."""
    return Manifest(number=None, plan_fingerprint=plan_fingerprint, table=build_table(commits, kept))


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
        CorruptShardError: the manifest cannot be read.
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
    try:
        table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
        header = json.loads(table.schema.metadata[_METADATA_KEY])
        version, plan_fingerprint = header["format_version"], header["plan_fingerprint"]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise CorruptShardError(
            f"{files.url}/{path}: expected a manifest, found {error}; run 'logitstore verify --repair'"
        ) from error
    if version != FORMAT_VERSION:
        raise IncompatibleStoreError(
            f"{files.url}/{path}: format version differs\n  in the manifest: {version}\n"
            f"  this program reads: {FORMAT_VERSION}\ninstall a logitstore that reads that version"
        )
    if not table.schema.remove_metadata().equals(SCHEMA):
        raise CorruptShardError(
            f"{files.url}/{path}: expected the columns of a manifest, found others; run 'logitstore verify --repair'"
        )
    return Manifest(number=number, plan_fingerprint=plan_fingerprint, table=table.combine_chunks())


def take_snapshot(
    files: StoreFiles,
    plan_fingerprint: str,
    previous: Manifest | None,
    *,
    recheck: Collection[int] = (),
    without: Collection[int] = (),
) -> Manifest:
    """What is committed now.

    Args:
        files: the store.
        plan_fingerprint: of its plan.
        previous: its units are not read again, but for those whose commit is about as new as this manifest or newer:
            a unit that was taken back and captured again has another commit. None reads every commit.
        recheck: units whose commits are read again in any case.
        without: units to leave out, committed or not.
    Raises:
        CorruptShardError, IncompatibleStoreError: a commit is damaged, or belongs to another plan or format version.
    """
    excluded = frozenset(without)
    listed = {unit: file for unit, file in list_unit_files(files, COMMITS).items() if unit not in excluded}
    kept: pa.Table | None = None
    known: set[int] = set()
    if previous is not None:
        known = _find_unchanged(files, previous, listed) - set(recheck)
        kept = previous.table.filter(pc.is_in(previous.table["unit"], pa.array(sorted(known), pa.int32())))
    paths = [build_commit_path(unit) for unit in listed if unit not in known]
    commits = (parse_commit(data, f"{files.url}/{path}") for path, data in files.read_existing(paths))
    return build_manifest(plan_fingerprint, _check_plan(files, commits, plan_fingerprint), kept)


def _find_unchanged(files: StoreFiles, manifest: Manifest, commits: dict[int, StoredFile]) -> set[int]:
    """Committed units of a manifest that were certainly not captured again; all of them where no times are told."""
    units = commits.keys() & set(manifest.units.tolist())
    times = {file.name: file.modified for file in files.list("")}
    written = times.get(build_manifest_path(manifest.number)) if manifest.number is not None else None
    if written is None:
        return units
    return {unit for unit in units if (commits[unit].modified or 0.0) < written - _SNAPSHOT_SECONDS}


def _check_plan(files: StoreFiles, commits: Iterable[Commit], plan_fingerprint: str) -> Iterable[Commit]:
    for commit in commits:
        if commit.plan_fingerprint != plan_fingerprint:
            raise IncompatibleStoreError(
                f"{files.url}/{build_commit_path(commit.unit)}: belongs to another plan\n"
                f"  in the commit: {commit.plan_fingerprint}\n  in plan.json:  {plan_fingerprint}"
            )
        yield commit


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
        if previous is not None and snapshot.table.equals(previous.table):
            return previous
        number = (numbers[-1] if numbers else 0) + 1
        if create_or_read_back(files, build_manifest_path(number), serialize_manifest(snapshot)):
            return Manifest(number=number, plan_fingerprint=plan_fingerprint, table=snapshot.table)
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


def serialize_manifest(manifest: Manifest) -> bytes:
    """The manifest as Parquet bytes, the same for the same snapshot."""
    header = {"format_version": FORMAT_VERSION, "plan_fingerprint": manifest.plan_fingerprint}
    table = manifest.table.replace_schema_metadata({_METADATA_KEY: json.dumps(header).encode()})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()
