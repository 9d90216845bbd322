"""Bytes of a corpus file, decompressed, a block at a time in bounded memory."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import IO, Protocol, cast

import zstandard
from fsspec import AbstractFileSystem

from logitstore.corpus.files import CorpusFile, StorageOptions, reading
from logitstore.errors import CorpusError, IncompatibleStoreError, OutsideError
from logitstore.storage_clients import open_filesystem

BLOCK_BYTES = 1024 * 1024
# One request to an object store per this many bytes: latency is paid once per request.
REQUEST_BYTES = 4 * 1024 * 1024
# Archives made with `zstd --long=31` need this window.
ZSTD_WINDOW_BYTES = 2**31
_END_MARK = b"logitstore: end of stream"


class RangeReader(io.RawIOBase):
    """A file as a seekable stream of ranged requests.

    Open files of one path on fsspec's memory filesystem share their position; ranges share nothing.
    """

    def __init__(self, filesystem: AbstractFileSystem, path: str, num_bytes: int) -> None:
        self._filesystem = filesystem
        self._path = path
        self._num_bytes = num_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed: any writable buffer
        stop = min(self._position + len(buffer), self._num_bytes)
        if stop <= self._position:
            return 0
        found = self._filesystem.cat_file(self._path, start=self._position, end=stop)
        if len(found) != stop - self._position:
            raise OutsideError(
                f"{self._path}: expected {stop - self._position} bytes at {self._position}, "
                f"found {len(found)}; try again"
            )
        buffer[: len(found)] = found
        self._position = stop
        return len(found)


def open_range_reader(file: CorpusFile, storage_options: StorageOptions | None = None) -> RangeReader:
    """The file's bytes as they are stored, as a seekable stream.

    Raises:
        CorpusError: the file is gone.
        IncompatibleStoreError: the file has another size than when the corpus was listed.
        OutsideError: the filesystem cannot be read.
    """
    filesystem, inner = open_filesystem(file.path, storage_options)
    with reading(file.path):
        found = filesystem.info(inner)["size"]
    if found != file.bytes:
        raise IncompatibleStoreError(
            f"{file.path}: the file changed after the capture was planned; restore it, or plan a new store\n"
            f"  bytes in the plan: {file.bytes}\n  bytes in the file: {found}"
        )
    return RangeReader(filesystem, inner, file.bytes)


def read_blocks(file: CorpusFile, start: int, storage_options: StorageOptions | None = None) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file from a decompressed offset on, in blocks of at most `BLOCK_BYTES`.

    Raises:
        CorpusError: compressed data is damaged or cut short.
        IncompatibleStoreError, OutsideError: see `open_range_reader`.
    """
    stream = open_range_reader(file, storage_options)
    if file.compression == "none":
        stream.seek(start)
        start = 0
    buffered = io.BufferedReader(stream, REQUEST_BYTES)
    with reading(file.path):
        try:
            for block in _decompress(file, buffered):
                if start < len(block):
                    yield block[start:] if start else block
                start = max(0, start - len(block))
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise CorpusError(
                f"{file.path}: expected whole {file.compression} data, found: {error}; replace the file"
            ) from error


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def _decompress(file: CorpusFile, stream: io.BufferedReader[RangeReader]) -> Iterator[bytes]:
    if file.compression == "zstd":
        return _read_zstd(stream)
    return _read_all(gzip.GzipFile(fileobj=stream) if file.compression == "gzip" else stream)


def _read_all(stream: _Readable) -> Iterator[bytes]:
    while block := stream.read(BLOCK_BYTES):
        yield block


class _Followed:
    """A stream with some bytes after its end."""

    def __init__(self, stream: _Readable, last: bytes) -> None:
        self._stream = stream
        self._last = io.BytesIO(last)

    def read(self, size: int = -1) -> bytes:
        return self._stream.read(size) or self._last.read(size)


def _read_zstd(stream: _Readable) -> Iterator[bytes]:
    """Blocks of all frames.

    The decoder takes the end of the input in the middle of a frame for the end of the data. So a frame that holds a
    mark is put behind the input: where the mark does not come out at the end, the input was cut short.
    """
    followed = _Followed(stream, zstandard.compress(_END_MARK))
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
    held = b""
    reader = decompressor.stream_reader(
        cast("IO[bytes]", followed),  # of a source it calls nothing but read
        read_size=BLOCK_BYTES,
        read_across_frames=True,
    )
    for block in _read_all(reader):
        joined = held + block
        if len(joined) > len(_END_MARK):
            yield joined[: -len(_END_MARK)]
        held = joined[-len(_END_MARK) :]
    if held != _END_MARK:
        raise EOFError("the end of the data in the middle of a frame")
