"""Pages: a column chunk's pages, decompressed and no further: values whose bytes still lie plane by plane.

Arrow rebuilds a list from two levels beside every value, which takes several times as long as all else. What a list of
a shard holds is known without its levels, from the other columns. A page of version 2 says of itself how long its
levels are, so they are stepped over; what is behind them is decompressed by Arrow and left as it is: byte 0 of all
values, then byte 1 of all, … Whoever needs the values puts their bytes together, all of them here, or a record's when
its turn comes (see `packed`). Where a record's list is empty it has a level and no value, and a page has fewer values
than levels. Such chunks are left to Arrow, and all whose pages are not as a writer of shards makes them. The layout of
a page's header (Thrift's compact protocol) is that of the Parquet specification.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitstore.shard.compiled import Loops, find_loops

# Of Thrift's compact protocol.
_TRUE, _FALSE, _I32, _I64, _BINARY, _STRUCT = 1, 2, 5, 6, 8, 12
_MOST_DEPTH = 4
_MOST_VARINT_BYTES = 10
# Of Parquet's enumerations, and fields of its structs `PageHeader` and `DataPageHeaderV2`.
_DATA_PAGE_V2, _BYTE_STREAM_SPLIT = 3, 9
_TYPE, _UNCOMPRESSED_SIZE, _COMPRESSED_SIZE, _VERSION_2 = 1, 2, 3, 8
_NUM_VALUES, _ENCODING, _DEFINITION_BYTES, _REPETITION_BYTES, _IS_COMPRESSED = 1, 4, 5, 6, 7
_DTYPES = {"INT32": np.dtype("<i4"), "FLOAT": np.dtype("<f4")}
_VALUE_BYTES, _LEAST_PLANES = 4, 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Pages:
    """The values of a column chunk, N in all.

    Attributes:
        dtype: int32 or float32.
        starts: the first value of each page, 0-based, then N.
        planes: of each page of n values [2 to 4, n] uint8, read-only: the lowest bytes of all, …, the highest of all
            but those that are 0 all over.
    """

    dtype: np.dtype
    starts: tuple[int, ...]
    planes: tuple[np.ndarray, ...]

    def join(self) -> np.ndarray:
        """[N] the values."""
        values, loops = np.empty(self.starts[-1], dtype="<i4"), find_loops((0, 1))
        for planes, (start, stop) in zip(self.planes, pairwise(self.starts), strict=True):
            join_planes(planes, values[start:stop], loops)
        return values.view(self.dtype)

    def has_16_bits(self) -> bool:
        """Whether all values are those of 16 bits without a sign."""
        return all(len(planes) == _LEAST_PLANES for planes in self.planes)


def join_planes(planes: np.ndarray, values: np.ndarray, loops: Loops | None) -> None:
    """Fill [n] int32 `values` from the planes of a page, or of a part of it: [2 to 4, n] uint8."""
    if loops is not None:
        loops.join_planes(planes, values)
        return
    by_bytes = values.view(np.uint8).reshape(-1, _VALUE_BYTES)
    for number in range(_VALUE_BYTES):
        by_bytes[:, number] = planes[number] if number < len(planes) else 0


def read_pages(chunks: Mapping[str, pq.ColumnChunkMetaData], offset: int, data: bytes) -> dict[str, Pages]:
    """The pages of those column chunks whose values are to be had without their lists.

    Args:
        chunks: of a row group, from the file's own footer, by any names.
        offset: where `data` begins in the file.
        data: bytes in which the chunks lie.
    """
    found = {name: _read_chunk(chunk, offset, data) for name, chunk in chunks.items()}
    return {name: pages for name, pages in found.items() if pages is not None}


def _read_chunk(chunk: pq.ColumnChunkMetaData, offset: int, data: bytes) -> Pages | None:
    if chunk.compression != "ZSTD" or chunk.has_dictionary_page or chunk.physical_type not in _DTYPES:
        return None
    at = chunk.data_page_offset - offset
    stop, most_bytes = min(at + chunk.total_compressed_size, len(data)), chunk.total_uncompressed_size
    planes: list[np.ndarray] = []
    try:
        while at < stop:
            header, at = _read_struct(data, at)
            page = _read_page(header, data, at, stop, most_bytes)
            if page is None:
                return None
            planes.append(page)
            at += header[_COMPRESSED_SIZE]
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError):
        return None  # Arrow says what is wrong with it
    starts = tuple(accumulate((page.shape[1] for page in planes), initial=0))
    if starts[-1] != chunk.num_values:
        return None
    return Pages(dtype=_DTYPES[chunk.physical_type], starts=starts, planes=tuple(planes))


def _read_page(header: Mapping[int, Any], data: bytes, at: int, stop: int, most_bytes: int) -> np.ndarray | None:
    """[2 to 4, n] uint8, the planes of the page whose bytes begin at a place; None where it is of another kind."""
    if header[_TYPE] != _DATA_PAGE_V2 or header[_VERSION_2][_ENCODING] != _BYTE_STREAM_SPLIT:
        return None
    described = header[_VERSION_2]
    level_bytes = described[_REPETITION_BYTES] + described[_DEFINITION_BYTES]
    compressed_bytes, num_bytes = (header[size] - level_bytes for size in (_COMPRESSED_SIZE, _UNCOMPRESSED_SIZE))
    is_within = min(level_bytes, compressed_bytes) >= 0 and at + header[_COMPRESSED_SIZE] <= stop
    if not is_within or num_bytes != _VALUE_BYTES * described[_NUM_VALUES] or not 0 <= num_bytes <= most_bytes:
        return None
    content = pa.py_buffer(data).slice(at + level_bytes, compressed_bytes)
    if described.get(_IS_COMPRESSED, True):
        content = pa.decompress(content, num_bytes, codec="zstd")
    return _copy_used(np.frombuffer(content, dtype=np.uint8).reshape(_VALUE_BYTES, described[_NUM_VALUES]))


def _copy_used(planes: np.ndarray) -> np.ndarray:
    """[2 to 4, n] uint8, without the highest planes where they are 0: a stream holds pages for a long time.

    A page that is let go of at once is decompressed into memory that is still in a core's cache.
    """
    used = len(planes)
    whole = planes.shape[1] & ~7  # looked at eight at a time
    while used > _LEAST_PLANES:
        highest = planes[used - 1]
        if highest[:whole].view("<u8").max(initial=0) or highest[whole:].any():
            break
        used -= 1
    return planes[:used].copy()


def _read_struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Numbers, truth values and structs of a struct, by the ids of their fields, and where it ends.

    Raises:
        ValueError: there is something else in it.
        IndexError: it goes on behind the end.
    """
    fields: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _read_integer(data, at)
        kind = head & 15
        if kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        elif kind in (_I32, _I64):
            fields[number], at = _read_integer(data, at)
        elif kind == _BINARY:
            length, at = _read_varint(data, at)
            at += length
        elif kind == _STRUCT and depth < _MOST_DEPTH:
            fields[number], at = _read_struct(data, at, depth + 1)
        else:
            raise ValueError(f"expected the header of a page, found a field of kind {kind}")
    return fields, at + 1


def _read_integer(data: bytes, at: int) -> tuple[int, int]:
    """A number with a sign, and where it ends."""
    value, at = _read_varint(data, at)
    return value >> 1 ^ -(value & 1), at


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for place in range(_MOST_VARINT_BYTES):
        byte = data[at + place]
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise ValueError("expected a number of 64 bits, found a longer one")
