"""Parquet files of data sets, on any storage: opened by ranges, and read a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from logitstore.corpus.blocks import REQUEST_BYTES, open_range_reader
from logitstore.corpus.files import CorpusFile, StorageOptions, reading
from logitstore.errors import ConfigError, CorpusError
from logitstore.interchange.layout import Layout

# A row of 8,192 positions with 128 entries each takes 17 MB in memory.
ROWS_AT_A_TIME = 8


@contextmanager
def open_parquet(file: CorpusFile, storage_options: StorageOptions | None = None) -> Iterator[pq.ParquetFile]:
    """A Parquet file that is read by ranges.

    Raises:
        CorpusError: the file is gone or no Parquet file.
        IncompatibleStoreError: it has another size than when it was listed.
        OutsideError: the storage failed.
    """
    stream = open_range_reader(file, storage_options)
    with reading(file.path):
        try:
            # Not buffered ahead: row groups may be gigabytes.
            yield pq.ParquetFile(stream, buffer_size=REQUEST_BYTES, pre_buffer=False)
        except pa.ArrowInvalid as error:
            raise CorpusError(f"{file.path}: expected a Parquet file, found: {error}; replace the file") from error


def check_columns(path: str, schema: pa.Schema, layout: Layout) -> None:
    """Raise ConfigError unless a file has the layout's columns, with lists of numbers in them."""
    missing = [name for name in layout.columns if name not in schema.names]
    if missing:
        raise ConfigError(
            f"{path}: expected the columns {', '.join(layout.columns)}, found {', '.join(schema.names)}; "
            f"{_advise(schema)}"
        )
    for name in (*layout.columns, *layout.optional_columns):
        if name in schema.names and not _is_list_of_numbers(schema.field(name).type):
            raise ConfigError(f"{path}: column {name!r}: expected lists of numbers, found {schema.field(name).type}")


def iterate_tables(parquet: pq.ParquetFile, layout: Layout, row_groups: range) -> Iterator[tuple[int, pa.Table]]:
    """Yield (first row in the file, table of a few rows) with the layout's columns."""
    first = sum(parquet.metadata.row_group(i).num_rows for i in range(row_groups.start))
    names = [name for name in (*layout.columns, *layout.optional_columns) if name in parquet.schema_arrow.names]
    batches = parquet.iter_batches(ROWS_AT_A_TIME, row_groups=row_groups, columns=names, use_threads=False)
    for batch in batches:
        yield first, pa.Table.from_batches([batch])
        first += len(batch)


def _is_list_of_numbers(kind: pa.DataType) -> bool:
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
            return True
    return False


def _advise(schema: pa.Schema) -> str:
    """What a data set of other columns may be."""
    names = set(schema.names)
    if {"packed_indices", "exact_values", "coeffs"} <= names:
        return "these are DistillKit's older compressed logits, whose normalization is not stored: they cannot be used"
    if "messages" in names or "logprobs" in names:
        return "import what axolotl prepared of it (its folder of prepared data), where token ids are"
    layouts = {"compressed_logprobs": "distillkit-compressed", "top_values": "distillkit", "target_logprobs": "axolotl"}
    fitting = next((layout for column, layout in layouts.items() if column in names), None)
    return f"try --layout {fitting}" if fitting else "choose the layout that the data set has"
