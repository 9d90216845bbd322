"""Rows of a query in every form: a table, JSON, CSV, Parquet."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from logitstore.errors import ConfigError
from tools.look import build_table
from tools.visible_text import make_visible

if TYPE_CHECKING:
    from rich.table import Table

# Lists may have a million entries; text is shown whole.
_LONGEST_LIST = 48
# More do not stand side by side in a terminal: they are shown one below the other.
_MOST_COLUMNS = 12


@dataclass(frozen=True, kw_only=True, eq=False)
class QueryResult:
    """Rows of a query, which are computed as they are read.

    Attributes:
        schema: names, all different, and types of the columns.
        batches: the rows, in order.
    """

    schema: pa.Schema
    batches: Iterator[pa.RecordBatch]


def render_rows(result: QueryResult, most: int) -> tuple[Table, bool]:
    """The first rows as a table, and whether there are more."""
    rows: list[tuple[object, ...]] = []
    for batch in result.batches:
        rows += _list_tuples(batch.slice(0, most + 1 - len(rows)))
        if len(rows) > most:
            break
    is_number = [
        pa.types.is_integer(t) or pa.types.is_floating(t) or pa.types.is_decimal(t) for t in result.schema.types
    ]
    names = [make_visible(name) for name in result.schema.names]
    if len(names) > _MOST_COLUMNS:
        cells = [(i, name, _show(x)) for i, row in enumerate(rows[:most]) for name, x in zip(names, row, strict=True)]
        return build_table(None, ["#row", "column", "value"], cells), len(rows) > most
    heads = [f"#{name}" if number else name for name, number in zip(names, is_number, strict=True)]
    return build_table(None, heads, [[_show(value) for value in row] for row in rows[:most]]), len(rows) > most


def write_json(result: QueryResult, file: BinaryIO) -> int:
    """Write all rows as one JSON document, a list of objects with a row per line; how many there were.

    What is no number, or infinite, is null, as is what is missing; bytes are hexadecimal digits.
    """
    num_rows, names = 0, result.schema.names
    for batch in result.batches:
        for row in _list_tuples(batch):
            values = {name: _as_json(value) for name, value in zip(names, row, strict=True)}
            text = json.dumps(values, ensure_ascii=False, allow_nan=False)
            file.write(f"{',' if num_rows else '['}\n{text}".encode(errors="replace"))
            num_rows += 1
    file.write(b"\n]\n" if num_rows else b"[]\n")
    file.flush()
    return num_rows


def write_csv(result: QueryResult, file: BinaryIO) -> int:
    """Write all rows as CSV; how many there were. Lists and the like, which CSV has not, are written as JSON."""
    from pyarrow import csv

    is_plain = [_is_plain(t) for t in result.schema.types]
    schema = pa.schema(
        [
            field if plain else pa.field(field.name, pa.string())
            for field, plain in zip(result.schema, is_plain, strict=True)
        ]
    )
    num_rows = 0
    with csv.CSVWriter(file, schema) as writer:
        for batch in result.batches:
            columns = [
                column if plain else _write_as_json(column)
                for column, plain in zip(batch.columns, is_plain, strict=True)
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
            num_rows += batch.num_rows
    return num_rows


def write_parquet(result: QueryResult, file: BinaryIO) -> int:
    """Write all rows as a Parquet file; how many there were.

    Raises:
        ConfigError: a column is of a type that such files do not have.
    """
    num_rows = 0
    try:
        writer = pq.ParquetWriter(file, result.schema, compression="zstd")
    except pa.ArrowNotImplementedError as error:
        raise ConfigError(f"--output: expected columns that Parquet has, found {error}; CAST them to VARCHAR") from None
    with writer:
        for batch in result.batches:
            writer.write_batch(batch)
            num_rows += batch.num_rows
    return num_rows


_WRITERS: dict[str, Callable[[QueryResult, BinaryIO], int]] = {
    ".csv": write_csv,
    ".json": write_json,
    ".parquet": write_parquet,
}


def check_output(path: Path) -> None:
    """Check before a query runs that its rows can be written.

    Raises:
        ConfigError: the name says no kind of file, or there is no folder for it.
    """
    if path.suffix not in _WRITERS:
        raise ConfigError(f"--output {path}: expected a name that ends with .csv, .json or .parquet")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: expected a folder to write it in, found none; make it first")


def write_rows(result: QueryResult, path: Path) -> int:
    """Write all rows to a file of the kind that its name says; how many there were.

    An earlier file is replaced when all is written, and stays as it is when something fails.

    Raises:
        ConfigError: the file cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            num_rows = _WRITERS[path.suffix](result, file)
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"--output {path}: expected a file to write, found {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return num_rows


def _list_tuples(batch: pa.RecordBatch) -> list[tuple[object, ...]]:
    """Rows by the places of columns."""
    return list(zip(*(column.to_pylist() for column in batch.columns), strict=True))


def _is_plain(kind: pa.DataType) -> bool:
    """Whether CSV has it."""
    return not (pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_interval(kind))


def _write_as_json(column: pa.Array) -> pa.Array:
    values = (_as_json(value) for value in column.to_pylist())
    texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return pa.array(texts, pa.string())


def _show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if value is None:
        return ""
    if isinstance(value, list | dict):
        text = json.dumps(_as_json(value), ensure_ascii=False)
        return make_visible(text if len(text) <= _LONGEST_LIST else f"{text[: _LONGEST_LIST - 1]}…")
    return make_visible(value.hex() if isinstance(value, bytes) else str(value))


def _as_json(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):  # also what sums of integers are
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    if isinstance(value, dict):
        return {name: _as_json(part) for name, part in value.items()}
    if isinstance(value, bytes):
        return value.hex()
    return value if value is None or isinstance(value, bool | int | str) else str(value)
