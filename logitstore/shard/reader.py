"""Read row groups of a shard from byte ranges, each checked against its digest before it is decoded."""

from __future__ import annotations

import contextlib
import hashlib
import io
from contextlib import AbstractContextManager

import pyarrow as pa
import pyarrow.parquet as pq

from logitstore.errors import CorruptShardError
from logitstore.records import RecordBatch
from logitstore.shard.digests import has_sha256
from logitstore.shard.exit_guard import hold_exit
from logitstore.shard.layout import SPLIT_COLUMNS, ShardHeader, build_batch, list_columns, read_header
from logitstore.shard.packed import PackedRowGroup, pack_supports
from logitstore.shard.pages import Pages, read_pages

# Of bytes that are no shard's, or columns that do not fit together.
_DECODING_ERRORS = (pa.ArrowException, OSError, LookupError, ValueError, TypeError)


def check_digest(data: bytes, expected_bytes: int, expected_sha256: str, *, where: str, what_to_do: str) -> None:
    """Hold bytes to the size and SHA-256 that were committed.

    Raises:
        CorruptShardError: they differ; prints both sides.
    """
    if len(data) != expected_bytes:
        raise CorruptShardError(f"{where}: expected {expected_bytes} bytes, found {len(data)}; {what_to_do}")
    if not has_sha256(data, bytes.fromhex(expected_sha256)):
        found = hashlib.sha256(data).hexdigest()
        raise CorruptShardError(
            f"{where}: the bytes are not the ones that were committed\n  sha256 in the commit: {expected_sha256}\n"
            f"  sha256 of the bytes:  {found}\n{what_to_do}"
        )


@hold_exit()
def read_footer(footer: bytes, where: str) -> tuple[pq.FileMetaData, ShardHeader]:
    """Parquet metadata and shard header from a file's last bytes (from the end of its last row group).

    Raises:
        CorruptShardError: the bytes are no Parquet footer, or that of an encrypted file, or its header cannot be read.
        IncompatibleStoreError: the file is no shard, or one of another format version.
    """
    try:
        metadata = pq.read_metadata(pa.BufferReader(footer))
    except (pa.ArrowException, OSError, ValueError) as error:  # or names that are no text
        raise CorruptShardError(
            f"{where}: expected a Parquet footer, found {error}; run 'logitstore verify'"
        ) from error
    # Behind the metadata of encrypted columns is a signature; to ask pyarrow about such a column ends the process.
    if (num_bytes := int.from_bytes(footer[-8:-4], "little")) != metadata.serialized_size:
        raise CorruptShardError(
            f"{where}: expected {num_bytes} bytes of Parquet metadata, found {metadata.serialized_size} and something "
            "behind them, a signature where columns are encrypted; run 'logitstore verify'"
        )
    return metadata, read_header(metadata.metadata, where)


@hold_exit()
def decode_row_group(
    metadata: pq.FileMetaData,
    header: ShardHeader,
    row_group: int,
    offset: int,
    data: bytes,
    *,
    with_documents: bool,
    where: str,
    is_thorough: bool = False,
    computing: AbstractContextManager[object] = contextlib.nullcontext(),  # noqa: B008  # holds nothing
) -> RecordBatch:
    """Decode one row group from its bytes.

    Args:
        metadata, header: from the file's footer, see `read_footer`.
        row_group: 0-based.
        offset: where `data` begins in the file.
        data: the row group's bytes, as they were committed.
        with_documents: whether to decode the columns that name documents.
        where: names the file in errors.
        is_thorough: also check what a digest already vouches for or reading does without: checksums of pages, and the
            lengths of all lists. It takes about twice the time.
        computing: entered while NumPy computes what Arrow has decompressed: many short calls, for threads that should
            not pass the interpreter's lock around.
    Raises:
        CorruptShardError: the bytes cannot be decoded.
    """
    try:
        table, pages = _open_row_group(metadata, header, row_group, offset, data, with_documents, is_thorough)
        flat = {name: column.join() for name, column in pages.items()}
        with computing:
            return build_batch(table, header.codec, header.temperatures, flat)
    except _DECODING_ERRORS as error:
        raise CorruptShardError(f"{where}: row group {row_group} cannot be decoded: {error}") from error


@hold_exit()
def pack_row_group(
    metadata: pq.FileMetaData,
    header: ShardHeader,
    row_group: int,
    offset: int,
    data: bytes,
    *,
    with_documents: bool,
    where: str,
    computing: AbstractContextManager[object] = contextlib.nullcontext(),  # noqa: B008  # holds nothing
) -> RecordBatch | PackedRowGroup:
    """One row group whose supports are decoded when they are wanted, if that can be; see `decode_row_group`.

    Raises:
        CorruptShardError: the bytes cannot be decoded.
    """
    codec, temperatures = header.codec, header.temperatures
    try:
        table, pages = _open_row_group(metadata, header, row_group, offset, data, with_documents, is_thorough=False)
        entries = {"support_ids", codec.value_column}
        flat = {name: column.join() for name, column in pages.items() if name not in entries}
        if entries <= pages.keys() and not header.is_drawn:
            with computing:
                columns = build_batch(table, codec, temperatures, flat, with_supports=False)
            ids, values = pages["support_ids"], pages[codec.value_column]
            supports = pack_supports(ids, values, columns.support_counts, are_steps=codec.kind == "compact")
            if supports is not None:
                return PackedRowGroup(columns=columns, supports=supports)
        flat |= {name: pages[name].join() for name in entries & pages.keys()}
        with computing:
            return build_batch(table, codec, temperatures, flat)
    except _DECODING_ERRORS as error:
        raise CorruptShardError(f"{where}: row group {row_group} cannot be decoded: {error}") from error


def _open_row_group(
    metadata: pq.FileMetaData,
    header: ShardHeader,
    row_group: int,
    offset: int,
    data: bytes,
    with_documents: bool,
    is_thorough: bool,
) -> tuple[pa.Table, dict[str, Pages]]:
    """The columns of a row group: pages of nearly all of it, and a table of the others."""
    columns = list_columns(header, with_documents=with_documents)
    pages = {} if is_thorough else _read_pages(metadata, row_group, offset, data, columns)
    # Neither pre-buffered nor read by threads: a thread of Arrow's that lets go of these Python objects while the
    # interpreter shuts down ends the process.
    file = pq.ParquetFile(
        pa.PythonFile(_FileWindow(offset, data), mode="r"),
        metadata=metadata,
        page_checksum_verification=True,
        pre_buffer=False,
    )
    others = [name for name in columns if name not in pages]
    return file.read_row_group(row_group, columns=others, use_threads=False), pages


def _read_pages(
    metadata: pq.FileMetaData, row_group: int, offset: int, data: bytes, columns: list[str]
) -> dict[str, Pages]:
    """Of the columns that make up nearly all of a row group, those that can be read without their lists."""
    found = metadata.row_group(row_group)
    chunks = [found.column(index) for index in range(found.num_columns)]
    named = {chunk.path_in_schema.partition(".")[0]: chunk for chunk in chunks}
    return read_pages({name: named[name] for name in columns if name in SPLIT_COLUMNS}, offset, data)


class _FileWindow(io.RawIOBase):
    """A readable file of which only one byte range is there."""

    def __init__(self, offset: int, data: bytes) -> None:
        self._offset, self._data, self._position = offset, memoryview(data), offset

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._offset + len(self._data)}[whence]
        self._position = base + position
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        start = self._position - self._offset
        if start < 0:
            raise OSError(f"byte {self._position} lies before the range that was read")
        stop = len(self._data) if size < 0 else start + size
        part = bytes(self._data[start:stop])
        self._position += len(part)
        return part
