"""SQL over a store: what `logitstore query` runs, in a DuckDB that holds nothing but the store's views."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from logitstore.errors import ConfigError, OutsideError, StoreNotFoundError
from logitstore.store.manifest_table import SCHEMA
from tools.look import build_table
from tools.opened_store import OpenedStore, open_store
from tools.query_views import VIEWS, list_statements
from tools.record_text import make_visible
from tools.token_text import load_find_text

if TYPE_CHECKING:
    import duckdb
    from rich.table import Table

_LATER = "; the views are " + ", ".join(VIEWS)


@dataclass(frozen=True, kw_only=True, eq=False)
class QueryResult:
    """Rows of a query, which are computed as they are read.

    Attributes:
        columns: their names.
        batches: the rows, in order.
        schema: their types.
    """

    columns: tuple[str, ...]
    batches: Iterator[pa.RecordBatch]
    schema: pa.Schema


@contextmanager
def run_query(
    url: str, sql: str, *, manifest: int | None = None, tokenizer: str | None = None
) -> Iterator[QueryResult]:
    """Run one query over a store's views, see `tools.query_views.VIEWS`; the rows are there inside of the block.

    DuckDB reads the shards by itself, and does not compare them with their digests.

    Args:
        url: of the store.
        sql: in DuckDB's dialect.
        manifest: number of a manifest; None for what is committed now.
        tokenizer: folder or name of a tokenizer in place of the teacher's.

    Raises:
        StoreNotFoundError: there is no store, or nothing is committed in it.
        ConfigError: DuckDB does not understand the query, or text is asked for and there is no tokenizer.
        OutsideError: a shard cannot be read.
    """
    import duckdb

    opened = open_store(url, manifest)
    # What does not fit in memory goes to a folder of its own, not to one beside the user's files.
    with (
        tempfile.TemporaryDirectory(prefix="logitstore-query-") as spill,
        duckdb.connect(config={"temp_directory": spill}) as connection,
        _explain(url),
    ):
        _open_views(connection, opened)
        if re.search(r"\bdead_letters\b", sql):
            connection.register("dead_letters", _list_dead_letters(url, manifest))
        if re.search(r"\bvocabulary\b|\btext\s*\(", sql):
            _open_vocabulary(connection, opened, tokenizer)
        relation = connection.sql(sql)
        if relation is None:  # no rows come of it
            yield QueryResult(columns=(), batches=iter(()), schema=pa.schema([]))
            return
        reader = relation.to_arrow_reader(100_000)
        yield QueryResult(columns=tuple(reader.schema.names), batches=iter(reader), schema=reader.schema)


@contextmanager
def _explain(url: str) -> Iterator[None]:
    import duckdb

    try:
        yield
    except (duckdb.IOException, duckdb.HTTPException) as error:
        raise OutsideError(
            f"{url}: expected shards that DuckDB can read, found {error}; run 'logitstore verify {url}'"
        ) from error
    except duckdb.Error as error:
        raise ConfigError(f"logitstore query: expected SQL of DuckDB, found {error}{_LATER}") from error


def _open_views(connection: duckdb.DuckDBPyConnection, opened: OpenedStore) -> None:
    store = opened.store
    names = [name for name in store.manifest.read_units("file")["file"].to_pylist() if name]
    if not names:
        raise StoreNotFoundError(f"{store.url}: expected committed records, found none; look at 'logitstore status'")
    filesystem, files = opened.files.locate(names)
    if filesystem is not None:
        connection.register_filesystem(filesystem)
    connection.execute("SET enable_progress_bar = false")
    connection.execute("SET VARIABLE files = $files", {"files": files})
    # All shards of a plan have the same columns.
    columns = [row[0] for row in connection.execute("DESCRIBE SELECT * FROM read_parquet($1)", [files[:1]]).fetchall()]
    for statement in list_statements(columns):
        connection.execute(statement)
    connection.register("row_groups", store.manifest.file.read(SCHEMA.names))


def _open_vocabulary(connection: duckdb.DuckDBPyConnection, opened: OpenedStore, tokenizer: str | None) -> None:
    teacher = opened.store.plan.teacher
    find_text, trouble = load_find_text(tokenizer or teacher.tokenizer_name, teacher, may_fetch=tokenizer is not None)
    if trouble is not None:
        raise ConfigError(f"logitstore query: expected a tokenizer for text, found none: {trouble}")
    texts = [find_text(None, [token_id]) for token_id in range(teacher.vocab_size)]
    connection.register("vocabulary", pa.table({"token_id": range(teacher.vocab_size), "text": texts}))
    connection.execute("CREATE MACRO text(id) AS (SELECT any_value(text) FROM vocabulary WHERE token_id = id)")


def _list_dead_letters(url: str, manifest: int | None) -> pa.Table:
    from tools.dead_letters import read_dead_letters

    letters = read_dead_letters(url, manifest).dead_letters
    names = ("unit", "reason", "document_id", "detail")
    return pa.table({name: [getattr(letter, name) for letter in letters] for name in names})


def render_rows(result: QueryResult, most: int) -> tuple[Table, bool]:
    """The first rows as a table, and whether there are more."""
    rows: list[list[object]] = []
    for batch in result.batches:
        rows += [list(row.values()) for row in batch.slice(0, most + 1 - len(rows)).to_pylist()]
        if len(rows) > most:
            break
    is_number = [
        pa.types.is_integer(t) or pa.types.is_floating(t) or pa.types.is_decimal(t) for t in result.schema.types
    ]
    names = [f"#{name}" if number else name for name, number in zip(result.columns, is_number, strict=True)]
    return build_table(None, names, [[_show(value) for value in row] for row in rows[:most]]), len(rows) > most


def list_rows(result: QueryResult) -> list[dict[str, object]]:
    """All rows by column, as JSON can hold them: what is no number, or infinite, is null, as is what is missing."""
    return [
        {name: _as_json(value) for name, value in row.items()} for batch in result.batches for row in batch.to_pylist()
    ]


def write_csv(result: QueryResult, file: BinaryIO) -> int:
    """Write all rows as CSV; how many there were."""
    from pyarrow import csv

    num_rows = 0
    with csv.CSVWriter(file, result.schema) as writer:
        for batch in result.batches:
            writer.write_batch(batch)
            num_rows += batch.num_rows
    return num_rows


def write_rows(result: QueryResult, path: Path) -> int:
    """Write all rows to a file of the kind that its name says; how many there were.

    Raises:
        ConfigError: the name says none, or the file cannot be written.
    """
    if path.suffix not in (".csv", ".json", ".parquet"):
        raise ConfigError(f"--output {path}: expected a name that ends with .csv, .json or .parquet")
    try:
        if path.suffix == ".csv":
            with path.open("wb") as file:
                return write_csv(result, file)
        if path.suffix == ".json":
            rows = list_rows(result)
            path.write_text(json.dumps(rows, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
            return len(rows)
        num_rows = 0
        with pq.ParquetWriter(path, result.schema, compression="zstd") as writer:
            for batch in result.batches:
                writer.write_batch(batch)
                num_rows += batch.num_rows
        return num_rows
    except OSError as error:
        raise ConfigError(f"--output {path}: expected a file to write, found {error}") from error


def _show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else make_visible(str(value))


def _as_json(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_as_json(part) for part in value]
    if isinstance(value, dict):
        return {name: _as_json(part) for name, part in value.items()}
    return value if value is None or isinstance(value, bool | int | str) else str(value)
