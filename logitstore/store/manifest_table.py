"""The table of a manifest: its columns, and how commits become rows.

A store of 100,000 shards has millions of rows, so they are built column by column, some thousands at a time, and what
is true of a whole unit stands on its first row only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from logitstore.shard.layout import SCHEMA as SHARD_SCHEMA
from logitstore.shard.summary import ShardSummary
from logitstore.store.commit import Commit

# On every row.
_KEY_FIELDS = [pa.field("unit", pa.int32()), pa.field("source", pa.string()), pa.field("row_group", pa.int32())]
# On the row of row group 0; null on the others.
UNIT_FIELDS = [
    pa.field("attempt", pa.string()),
    pa.field("file", pa.string()),
    pa.field("file_bytes", pa.int64()),
    pa.field("file_sha256", pa.binary()),
    pa.field("footer_offset", pa.int64()),
    pa.field("footer_sha256", pa.binary()),
    pa.field("documents", pa.int64()),
    pa.field("recorded_documents", pa.int64()),
    pa.field("dead_letter_counts", pa.string()),
    pa.field("column_bytes", pa.list_(pa.int64())),
    pa.field("entropy_histogram", pa.list_(pa.int64())),
    pa.field("tail_histogram", pa.list_(pa.int64())),
]
_ROW_GROUP_FIELDS = [
    pa.field("offset", pa.int64()),
    pa.field("bytes", pa.int64()),
    pa.field("sha256", pa.binary(32)),
    pa.field("records", pa.int64()),
    pa.field("positions", pa.int64()),
    pa.field("taught_positions", pa.int64()),
    pa.field("support_entries", pa.int64()),
    pa.field("entropy_sum", pa.float64()),
    pa.field("next_token_logprob_sum", pa.float64()),
    pa.field("impossible_tokens", pa.int64()),
    pa.field("tail_mass_sum", pa.float64()),
]
SCHEMA = pa.schema(_KEY_FIELDS + UNIT_FIELDS + _ROW_GROUP_FIELDS)
# Rows that are Python objects at a time: about 20 MB.
_ROWS_AT_A_TIME = 16_384


def build_table(commits: Iterable[Commit], kept: pa.Table | None = None) -> pa.Table:
    """Rows of commits, in any order, joined to rows of other units; ordered by unit and row group.

    Args:
        commits: taken one by one; none is held.
        kept: rows of an earlier table, none of them of a unit in `commits`.
    """
    tables = [kept] if kept is not None else []
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for commit in commits:
        _append_commit(columns, commit)
        if len(columns["unit"]) >= _ROWS_AT_A_TIME:
            tables.append(pa.Table.from_pydict(columns, schema=SCHEMA))
            columns = {name: [] for name in SCHEMA.names}
    tables.append(pa.Table.from_pydict(columns, schema=SCHEMA))
    table = pa.concat_tables(tables)
    # Commits usually come in order: a sort would hold every row twice more.
    if not _is_ordered(table):
        table = table.sort_by([("unit", "ascending"), ("row_group", "ascending")])
    return table.combine_chunks()


def _append_commit(columns: dict[str, list[Any]], commit: Commit) -> None:
    row_groups = commit.shard.row_groups if commit.shard is not None else ()
    num_rows = max(1, len(row_groups))
    columns["unit"].extend([commit.unit] * num_rows)
    columns["source"].extend([commit.source] * num_rows)
    columns["row_group"].extend(range(num_rows))
    for name, value in _describe_unit(commit).items():
        columns[name].append(value)
        columns[name].extend([None] * (num_rows - 1))
    for field in _ROW_GROUP_FIELDS:
        if field.name == "sha256":
            columns["sha256"].extend([bytes.fromhex(row_group.sha256) for row_group in row_groups] or [None])
        else:
            columns[field.name].extend([getattr(row_group, field.name) for row_group in row_groups] or [0])


def _describe_unit(commit: Commit) -> dict[str, Any]:
    values: dict[str, Any] = {field.name: None for field in UNIT_FIELDS}
    values |= {
        "attempt": commit.attempt,
        "file": commit.file,
        "file_bytes": 0,
        "footer_offset": 0,
        "documents": commit.documents,
        "recorded_documents": commit.recorded_documents,
        "dead_letter_counts": json.dumps(commit.dead_letter_counts),
    }
    return values | (_describe_shard(commit.shard) if commit.shard is not None else {})


def _describe_shard(shard: ShardSummary) -> dict[str, Any]:
    column_bytes = [[group.column_bytes.get(name, 0) for name in SHARD_SCHEMA.names] for group in shard.row_groups]
    return {
        "file_bytes": shard.bytes,
        "file_sha256": bytes.fromhex(shard.sha256),
        "footer_offset": shard.footer_offset,
        "footer_sha256": bytes.fromhex(shard.footer_sha256),
        "column_bytes": np.sum(column_bytes, axis=0).tolist(),
        "entropy_histogram": np.sum([group.entropy_histogram for group in shard.row_groups], axis=0).tolist(),
        "tail_histogram": np.sum([group.tail_histogram for group in shard.row_groups], axis=0).tolist(),
    }


def _is_ordered(table: pa.Table) -> bool:
    keys = table["unit"].to_numpy().astype(np.int64) << 32 | table["row_group"].to_numpy().astype(np.int64)
    return bool((keys[1:] > keys[:-1]).all())
