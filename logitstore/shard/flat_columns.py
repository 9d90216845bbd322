"""Values of columns of lists, read as if there were no lists.

Arrow rebuilds a list from two levels beside every value, which takes several times as long as all else. What a list of
a shard holds is known without its levels, from the other columns. So Arrow is given another footer, in which the same
pages belong to a plain column of as many values: readers step over levels in pages of version 2 by what the pages
themselves say of them. Where a record's list is empty it has a level and no value, and Arrow finds fewer values than it
was told. Such columns are left alone, and those in pages of version 1, which hold their levels among the values. The
layout of a footer (Thrift's compact protocol) is that of the Parquet specification.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# Of Thrift's compact protocol.
_I32, _I64, _BINARY, _LIST, _STRUCT = 5, 6, 8, 9, 12
_STOP = b"\0"
# Of Parquet's enumerations.
_PHYSICAL_TYPES = {"INT32": 1, "FLOAT": 4}
_REQUIRED, _ZSTD, _RLE, _BYTE_STREAM_SPLIT = 0, 6, 3, 9
_MAGIC = b"PAR1"
# How the header of a page of version 2 begins: its first field is a number of 32 bits, 3.
_VERSION_2_BEGINS = b"\x15\x06"


def read_flat_columns(chunks: Mapping[str, pq.ColumnChunkMetaData], offset: int, data: bytes) -> dict[str, np.ndarray]:
    """[N] the values of all lists of a column chunk, joined, as Parquet keeps them, of those whose values are to be had
    without their lists.

    Args:
        chunks: of a row group, from the file's own footer, by any names.
        offset: where `data` begins in the file.
        data: bytes in which the chunks lie.
    """
    alike: dict[int, dict[str, pq.ColumnChunkMetaData]] = {}
    for name, chunk in chunks.items():
        if _is_usual(chunk, offset, data):
            alike.setdefault(chunk.num_values, {})[name] = chunk
    values: dict[str, np.ndarray] = {}
    for of_one_length in alike.values():
        values |= _read_alike(of_one_length, offset, data)
    return values


def _is_usual(chunk: pq.ColumnChunkMetaData, offset: int, data: bytes) -> bool:
    start = chunk.data_page_offset - offset
    return (
        chunk.compression == "ZSTD"
        and "BYTE_STREAM_SPLIT" in chunk.encodings
        and not chunk.has_dictionary_page
        and chunk.physical_type in _PHYSICAL_TYPES
        and data[start : start + 2] == _VERSION_2_BEGINS
    )


def _read_alike(chunks: Mapping[str, pq.ColumnChunkMetaData], offset: int, data: bytes) -> dict[str, np.ndarray]:
    """Of columns of equally many values: one reader for all of them, since to set one up takes its time."""
    footer = _write_footer(list(chunks.values()), offset)
    framed = _MAGIC + footer + len(footer).to_bytes(4, "little") + _MAGIC
    try:
        metadata = pq.read_metadata(pa.BufferReader(framed))
        file = pq.ParquetFile(pa.BufferReader(data), metadata=metadata, pre_buffer=False)
        columns = file.read_row_group(0, use_threads=False).columns
    except (pa.ArrowException, OSError):
        return {}
    return {name: column.to_numpy() for name, column in zip(chunks, columns, strict=True)}


def _write_footer(chunks: Sequence[pq.ColumnChunkMetaData], offset: int) -> bytes:
    """FileMetaData of a file of one row group, in whose plain columns 0, 1, … the chunks lie; all have equally many
    values."""
    num_values = chunks[0].num_values
    root = _write_head(_BINARY, 4) + _write_binary(b"schema") + _write_integer(_I32, 1, len(chunks)) + _STOP
    leaves = [
        _write_integer(_I32, 1, _PHYSICAL_TYPES[chunk.physical_type])
        + _write_integer(_I32, 2, _REQUIRED)
        + _write_head(_BINARY, 1)
        + _write_binary(b"%d" % number)
        + _STOP
        for number, chunk in enumerate(chunks)
    ]
    row_group = (
        _write_list(1, _STRUCT, [_write_chunk(chunk, offset, b"%d" % number) for number, chunk in enumerate(chunks)])
        + _write_integer(_I64, 1, sum(chunk.total_uncompressed_size for chunk in chunks))
        + _write_integer(_I64, 1, num_values)
        + _STOP
    )
    return (
        _write_integer(_I32, 1, 2)
        + _write_list(1, _STRUCT, [root, *leaves])
        + _write_integer(_I64, 1, num_values)
        + _write_list(1, _STRUCT, [row_group])
        + _STOP
    )


def _write_chunk(chunk: pq.ColumnChunkMetaData, offset: int, name: bytes) -> bytes:
    """ColumnChunk and ColumnMetaData, of a plain column."""
    start = chunk.data_page_offset - offset
    encodings = [_zigzag(_RLE), _zigzag(_BYTE_STREAM_SPLIT)]
    column = (
        _write_integer(_I32, 1, _PHYSICAL_TYPES[chunk.physical_type])
        + _write_list(1, _I32, encodings)
        + _write_list(1, _BINARY, [_write_binary(name)])
        + _write_integer(_I32, 1, _ZSTD)
        + _write_integer(_I64, 1, chunk.num_values)
        + _write_integer(_I64, 1, chunk.total_uncompressed_size)
        + _write_integer(_I64, 1, chunk.total_compressed_size)
        + _write_integer(_I64, 2, start)
        + _STOP
    )
    return _write_integer(_I64, 2, start) + _write_head(_STRUCT, 1) + column + _STOP


def _write_head(kind: int, step: int) -> bytes:
    """Of a field, by how much its id is above that of the field before."""
    return bytes([step << 4 | kind])


def _write_integer(kind: int, step: int, value: int) -> bytes:
    return _write_head(kind, step) + _zigzag(value)


def _write_list(step: int, kind: int, items: Sequence[bytes]) -> bytes:
    return _write_head(_LIST, step) + bytes([len(items) << 4 | kind]) + b"".join(items)


def _write_binary(value: bytes) -> bytes:
    return _write_varint(len(value)) + value


def _zigzag(value: int) -> bytes:
    """Of a number that is not negative."""
    return _write_varint(value << 1)


def _write_varint(value: int) -> bytes:
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    return bytes([*written, value])
