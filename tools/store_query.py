"""SQL over a store: what `logitstore query` runs, in a DuckDB of its own that has the store's views."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from logitstore.errors import ConfigError, LogitStoreError, OutsideError, StoreNotFoundError
from logitstore.store.manifest_table import SCHEMA
from tools.opened_store import OpenedStore, open_store
from tools.query_output import QueryResult
from tools.query_views import VIEWS, list_statements
from tools.token_text import find_plain_token, load_find_text

if TYPE_CHECKING:
    import duckdb

_Result = TypeVar("_Result")
_ROWS_AT_A_TIME = 100_000
_SECONDS_BETWEEN_INTERRUPTS = 0.05
# Nothing is fetched from anywhere because a query names a function that an extension has.
_CONFIG = {"autoinstall_known_extensions": False}
_LATER = "; the views are " + ", ".join(VIEWS)


@contextmanager
def run_query(
    url: str, sql: str, *, manifest: int | None = None, tokenizer: str | None = None
) -> Iterator[QueryResult]:
    """Run one query over a store's views, see `tools.query_views.VIEWS`; the rows are there inside of the block.

    DuckDB reads the shards by itself, and does not compare them with their digests. It may do what the caller may: a
    query can read other files too, and with COPY or ATTACH write some.

    Args:
        url: of the store.
        sql: in DuckDB's dialect; of several statements the last one's rows are returned.
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
        duckdb.connect(config={**_CONFIG, "temp_directory": spill}) as connection,
        _Waiting(connection, url) as waiting,
    ):
        waiting.run(lambda: _open_views(connection, opened))
        if re.search(r"\bdead_letters\b", sql, re.IGNORECASE):
            connection.register("dead_letters", _list_dead_letters(url, manifest))
        if re.search(r"\bvocabulary\b|\btext\s*\(", sql, re.IGNORECASE):
            _open_vocabulary(connection, opened, tokenizer)
        relation = waiting.run(lambda: connection.sql(sql))
        if relation is None:  # no rows come of it
            yield QueryResult(batches=iter(()), schema=pa.schema([]))
            return
        reader = waiting.run(lambda: relation.to_arrow_reader(_ROWS_AT_A_TIME))
        schema = pa.schema(
            [field.with_name(name) for field, name in zip(reader.schema, _name_apart(reader.schema.names), strict=True)]
        )
        yield QueryResult(batches=_read_batches(waiting, reader, schema), schema=schema)


def _name_apart(names: list[str]) -> list[str]:
    """The names, those that come again with a number behind them."""
    found: dict[str, None] = {}
    for name in names:
        number, apart = 0, name
        while apart in found:
            number += 1
            apart = f"{name}_{number}"
        found[apart] = None
    return list(found)


def _read_batches(waiting: _Waiting, reader: pa.RecordBatchReader, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    while (batch := waiting.run(lambda: next(reader, None))) is not None:
        yield pa.RecordBatch.from_arrays(batch.columns, schema=schema)


class _Waiting:
    """Has DuckDB work in a thread, so that Ctrl-C is heard while it does, and says what its errors mean."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, url: str) -> None:
        self._connection, self._url = connection, url
        self._pool = ThreadPoolExecutor(1)
        self._works: set[Future[Any]] = set()  # the one that is at work, if any

    def __enter__(self) -> _Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        # Whoever has seen enough rows does not wait for the others. Asked again and again: between two statements
        # DuckDB forgets that it was interrupted.
        self._connection.interrupt()
        while wait(self._works, timeout=_SECONDS_BETWEEN_INTERRUPTS).not_done:
            self._connection.interrupt()
        self._pool.shutdown()

    def run(self, work: Callable[[], _Result]) -> _Result:
        """What `work` returns.

        Raises:
            ConfigError, OutsideError: DuckDB fails.
        """
        import duckdb

        future = self._pool.submit(work)
        self._works = {future}
        try:
            return future.result()
        except LogitStoreError:
            raise
        # Rows come through Arrow, whose errors keep of DuckDB's no more than the text.
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            if isinstance(error, duckdb.IOException | duckdb.HTTPException) or str(error).startswith(("IO", "HTTP")):
                raise OutsideError(
                    f"{self._url}: expected shards that DuckDB can read, found {error}; run 'logitstore verify "
                    f"{self._url}'"
                ) from error
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
    # Behind another token: at the beginning of a text, many tokenizers drop a space.
    before = find_plain_token(range(teacher.vocab_size), find_text)
    texts = [find_text(before, [token_id]) for token_id in range(teacher.vocab_size)]
    connection.register("vocabulary", pa.table({"token_id": range(teacher.vocab_size), "text": texts}))
    connection.execute("CREATE MACRO text(id) AS (SELECT any_value(text) FROM vocabulary WHERE token_id = id)")


def _list_dead_letters(url: str, manifest: int | None) -> pa.Table:
    from tools.dead_letters import read_dead_letters

    letters = read_dead_letters(url, manifest).dead_letters
    names = ("unit", "reason", "document_id", "detail")
    return pa.table({name: [getattr(letter, name) for letter in letters] for name in names})
