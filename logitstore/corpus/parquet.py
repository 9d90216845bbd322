"""Rows of a Parquet file as documents, and the sizes of its row groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from logitstore.corpus.blocks import REQUEST_BYTES, open_range_reader
from logitstore.corpus.files import CorpusFile, CorpusSettings, StorageOptions, reading
from logitstore.corpus.parsing import RejectedDocumentError, name_document, parse_cell
from logitstore.errors import ConfigError, CorpusError

# Rows decoded at once: documents may be megabytes long.
NUM_ROWS_AT_ONCE = 64


def read_row_group_bytes(
    file: CorpusFile, settings: CorpusSettings, storage_options: StorageOptions | None = None
) -> list[int]:
    """Uncompressed bytes of the text column in each row group, from the file's footer.

    Raises:
        ConfigError: the file is no Parquet file, or has no such column.
    """
    with _open(file, settings, storage_options) as parquet:
        metadata = parquet.metadata
        column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == settings.text_field)
        return [metadata.row_group(i).column(column).total_uncompressed_size for i in range(metadata.num_row_groups)]


def read_rows(
    file: CorpusFile,
    start: int,
    stop: int | None,
    settings: CorpusSettings,
    storage_options: StorageOptions | None = None,
) -> Iterator[tuple[int, str | None, str | RejectedDocumentError]]:
    """Yield (0-based row in the file, name or None, text or what is wrong with it) for row groups [start, stop).

    Raises:
        ConfigError: the file is no Parquet file, or lacks a column.
    """
    with _open(file, settings, storage_options) as parquet:
        stop = parquet.num_row_groups if stop is None else min(stop, parquet.num_row_groups)
        row = sum(parquet.metadata.row_group(i).num_rows for i in range(start))
        columns = [settings.text_field] if settings.id_field is None else [settings.text_field, settings.id_field]
        batches = parquet.iter_batches(
            batch_size=NUM_ROWS_AT_ONCE,
            row_groups=range(start, stop),
            columns=list(dict.fromkeys(columns)),
            use_threads=False,
        )
        for batch in batches if start < stop else ():
            names = [None] * len(batch) if settings.id_field is None else _read_names(batch.column(settings.id_field))
            for name, content in zip(names, _as_bytes(batch.column(settings.text_field)), strict=True):
                try:
                    yield row, name, parse_cell(content, settings)
                except RejectedDocumentError as rejection:
                    yield row, None, rejection
                row += 1


@contextmanager
def _open(
    file: CorpusFile, settings: CorpusSettings, storage_options: StorageOptions | None
) -> Iterator[pq.ParquetFile]:
    stream = open_range_reader(file, storage_options)
    with reading(file.path):
        try:
            parquet = pq.ParquetFile(stream, buffer_size=REQUEST_BYTES, pre_buffer=False)
            for field in {settings.text_field, settings.id_field or settings.text_field}:
                _check_column(file, parquet.schema_arrow, field, is_text=field == settings.text_field)
            yield parquet
        except pa.ArrowInvalid as error:
            raise CorpusError(f"{file.path}: expected a Parquet file, found: {error}; replace the file") from error


def _check_column(file: CorpusFile, schema: pa.Schema, column: str, *, is_text: bool) -> None:
    if column not in schema.names:
        raise ConfigError(
            f"{file.path}: expected a column {column!r}, found {schema.names}; set text_field or id_field"
        )
    found = schema.field(column).type
    if is_text and not _is_text(found):
        raise ConfigError(f"{file.path}: column {column!r}: expected strings, found {found}; set text_field")


def _is_text(kind: pa.DataType) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return value in (
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
    )


def _read_names(column: pa.Array) -> list[str | None]:
    if not _is_text(column.type):
        return [name_document(value) for value in column.to_pylist()]
    texts = (value and value.decode("utf-8", "surrogateescape") for value in _as_bytes(column))
    return [name_document(text) for text in texts]


def _as_bytes(column: pa.Array) -> list[bytes | None]:
    """Values as bytes: Arrow does not check that strings are UTF-8, so they must not be decoded unchecked."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary()).to_pylist()  # type: ignore[no-any-return]  # pyarrow is untyped
