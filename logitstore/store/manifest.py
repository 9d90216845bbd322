"""Manifests: numbered, immutable snapshots of the commits, one row per row group. They are what readers open.

Opening a store is then two small reads however many units it has, and a training run that pins a number sees the same
records for ever, whatever is captured or repaired later.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from logitstore.errors import CorruptShardError, IncompatibleStoreError, OutsideError, StoreNotFoundError
from logitstore.shard.layout import FORMAT_VERSION
from logitstore.shard.layout import SCHEMA as SHARD_SCHEMA
from logitstore.shard.summary import RowGroup
from logitstore.store.commit import COMMITS, Commit, build_commit_path, list_units, parse_commit
from logitstore.store.files import StoreFiles

_METADATA_KEY = b"logitstore_manifest"
_UNIT_FIELDS = [
    pa.field("unit", pa.int32()),
    pa.field("source", pa.string()),
    pa.field("attempt", pa.string()),
    pa.field("file", pa.string()),
    pa.field("file_bytes", pa.int64()),
    pa.field("file_sha256", pa.string()),
    pa.field("footer_offset", pa.int64()),
    pa.field("footer_sha256", pa.string()),
    pa.field("documents", pa.int64()),
    pa.field("recorded_documents", pa.int64()),
    pa.field("dead_letter_counts", pa.string()),
]
_ROW_GROUP_FIELDS = [
    pa.field("row_group", pa.int32()),
    pa.field("offset", pa.int64()),
    pa.field("bytes", pa.int64()),
    pa.field("sha256", pa.string()),
    pa.field("records", pa.int64()),
    pa.field("positions", pa.int64()),
    pa.field("taught_positions", pa.int64()),
    pa.field("support_entries", pa.int64()),
    pa.field("entropy_sum", pa.float64()),
    pa.field("next_token_logprob_sum", pa.float64()),
    pa.field("impossible_tokens", pa.int64()),
    pa.field("tail_mass_sum", pa.float64()),
    pa.field("entropy_histogram", pa.list_(pa.int64())),
    pa.field("tail_histogram", pa.list_(pa.int64())),
]
_COLUMN_BYTES_FIELDS = [pa.field(f"{name}_bytes", pa.int64()) for name in SHARD_SCHEMA.names]
SCHEMA = pa.schema(_UNIT_FIELDS + _ROW_GROUP_FIELDS + _COLUMN_BYTES_FIELDS)


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
        return self.table.filter(pc.greater(self.table["records"], 0))

    @cached_property
    def units(self) -> np.ndarray:
        """[U] int32, the committed units, ascending."""
        return np.unique(self.table["unit"].to_numpy())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what the records are: plan, and the digest of every row group in order."""
        digest = hashlib.sha256(self.plan_fingerprint.encode())
        for chunk in self.row_groups["sha256"].chunks:
            digest.update("".join(chunk.to_pylist()).encode())
        return digest.hexdigest()

    @cached_property
    def per_unit(self) -> pa.Table:
        """One row per committed unit, unit columns only."""
        first = pc.equal(self.table["row_group"], 0)
        return self.table.filter(first).select([field.name for field in _UNIT_FIELDS])


def build_manifest(plan_fingerprint: str, commits: Iterable[Commit], previous: pa.Table | None = None) -> Manifest:
    """Snapshot from commits, in any order, joined to the rows kept of an earlier snapshot."""
    rows = [row for commit in commits for row in _build_rows(commit)]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    if previous is not None:
        table = pa.concat_tables([previous, table])
    table = table.sort_by([("unit", "ascending"), ("row_group", "ascending")]).combine_chunks()
    return Manifest(number=None, plan_fingerprint=plan_fingerprint, table=table)


def _build_rows(commit: Commit) -> list[dict[str, Any]]:
    shard = commit.shard
    unit_values = {
        "unit": commit.unit,
        "source": commit.source,
        "attempt": commit.attempt,
        "file": commit.file,
        "file_bytes": shard.bytes if shard else 0,
        "file_sha256": shard.sha256 if shard else None,
        "footer_offset": shard.footer_offset if shard else 0,
        "footer_sha256": shard.footer_sha256 if shard else None,
        "documents": commit.documents,
        "recorded_documents": commit.recorded_documents,
        "dead_letter_counts": json.dumps(commit.dead_letter_counts),
    }
    if shard is None:
        return [{**unit_values, "row_group": 0, "records": 0, "positions": 0, "bytes": 0, "support_entries": 0}]
    return [
        {**unit_values, "row_group": index, **_flatten_row_group(row_group)}
        for index, row_group in enumerate(shard.row_groups)
    ]


def _flatten_row_group(row_group: RowGroup) -> dict[str, Any]:
    values = row_group.model_dump(exclude={"column_bytes"})
    return {**values, **{f"{name}_bytes": size for name, size in row_group.column_bytes.items()}}


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
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise CorruptShardError(
            f"{files.url}/{path}: expected a manifest, found {error}; run 'logitstore verify --repair'"
        ) from error
    if header["format_version"] != FORMAT_VERSION:
        raise IncompatibleStoreError(
            f"{files.url}/{path}: format version differs\n  in the manifest: {header['format_version']}\n"
            f"  this program reads: {FORMAT_VERSION}"
        )
    return Manifest(number=number, plan_fingerprint=header["plan_fingerprint"], table=table.select(SCHEMA.names))


def take_snapshot(files: StoreFiles, plan_fingerprint: str, previous: Manifest | None) -> Manifest:
    """What is committed now. Units of the previous manifest are not read again; units that lost their commit go."""
    committed = list_units(files, COMMITS)
    kept: pa.Table | None = None
    known: set[int] = set()
    if previous is not None:
        kept = previous.table.filter(pc.is_in(previous.table["unit"], pa.array(committed, pa.int32())))
        known = set(np.unique(kept["unit"].to_numpy()).tolist())
    paths = [build_commit_path(unit) for unit in committed if unit not in known]
    commits = (
        parse_commit(data, f"{files.url}/{path}") for path, data in zip(paths, files.read_many(paths), strict=True)
    )
    return build_manifest(plan_fingerprint, _check_plan(files, commits, plan_fingerprint), kept)


def _check_plan(files: StoreFiles, commits: Iterable[Commit], plan_fingerprint: str) -> Iterable[Commit]:
    for commit in commits:
        if commit.plan_fingerprint != plan_fingerprint:
            raise IncompatibleStoreError(
                f"{files.url}/{build_commit_path(commit.unit)}: belongs to another plan\n"
                f"  in the commit: {commit.plan_fingerprint}\n  in plan.json:  {plan_fingerprint}"
            )
        yield commit


def write_manifest(files: StoreFiles, plan_fingerprint: str) -> Manifest:
    """Store a snapshot of the commits under the next number; nothing is written when nothing has changed."""
    for _ in range(10):
        numbers = list_manifests(files)
        previous = _read_previous(files, numbers, plan_fingerprint)
        snapshot = take_snapshot(files, plan_fingerprint, previous)
        if previous is not None and snapshot.table.equals(previous.table.combine_chunks()):
            return previous
        number = (numbers[-1] if numbers else 0) + 1
        data = serialize_manifest(snapshot)
        path = build_manifest_path(number)
        if files.create(path, data) or files.read(path) == data:
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
