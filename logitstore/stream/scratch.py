"""RowGroupScratch: decompressed row groups in a file of this process alone, for the epochs after the first.

Decompressing takes over half of what reading a record takes, in every epoch anew. Decompressed and otherwise as a
stream holds them, records take about twice the bytes of their shards, and on a local disk, or in memory that the system
keeps of it, they are there for the price of copying them. What the scratch promises, and how:

1. *The right bytes.* What is kept was made of bytes that were held to the digests of the manifest. The file has no
   name: no other program opens it, and the next process finds none. What is read back is held to the XXH3, 64 bits with
   a seed of its own, that was computed before it was written. Where it does not fit, or cannot be read, the row group
   is dropped, counted, and read from the store as if it had never been kept.
2. *Reading goes on.* A disk that is full or fails costs one line in the log; what was kept until then is used.
3. *Not more than `max_bytes`*, of each process that reads: a rank, or a worker of a DataLoader, has its own. Nothing
   makes room for anything else: an epoch reads everything once, in an order that is new, so that all row groups are
   worth the same.
4. *No traces.* The file is gone when the stream is, and when the process is killed.

Each row group is a block of its own: a pickle, then the arrays that it leaves out, as they lie in memory.
"""

from __future__ import annotations

import functools
import logging
import os
import pickle
import secrets
import tempfile
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import ByteSize, Field

from logitstore.errors import ConfigError
from logitstore.records import RecordBatch
from logitstore.settings import Settings
from logitstore.shard.packed import PackedRowGroup

_LOG = logging.getLogger(__name__)
# Arrays begin where a core's cache lines do.
_ALIGNED_BYTES = 64
# That the system writes with one call.
_MOST_PARTS = 1024


class ScratchSettings(Settings):
    """A folder on a fast local disk for decompressed row groups.

    Attributes:
        folder: made where there is none; nothing is seen in it.
        max_bytes: what each process that reads may keep there, such as `200GB`.
    """

    folder: str
    max_bytes: Annotated[ByteSize, Field(gt=0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScratchStatistics:
    """What a scratch did for this process.

    Attributes:
        kept: row groups that it can answer for.
        file_bytes: what the file takes on the disk.
        read: reads that it answered.
        damaged: row groups that were dropped because what was read was not what had been written.
    """

    kept: int = 0
    file_bytes: int = 0
    read: int = 0
    damaged: int = 0


class _Block(NamedTuple):
    """Where a row group lies: a pickle of `head_bytes`, then arrays."""

    offset: int
    num_bytes: int
    head_bytes: int
    xxh3: int


class RowGroupScratch:
    """Keeps row groups by their numbers; safe to use from threads, and of no use to another process.

    Args:
        settings: where, and how much.
    Raises:
        ConfigError: xxhash is not installed, or no file can be made in the folder.
    """

    def __init__(self, settings: ScratchSettings) -> None:
        try:
            import xxhash
        except ImportError as error:
            raise ConfigError(
                "scratch: expected the package xxhash, which holds what is read back to what was written, found none; "
                "run 'pip install logitstore[fast]'"
            ) from error
        self._start_xxh3 = functools.partial(xxhash.xxh3_64, seed=secrets.randbits(64))
        try:
            Path(settings.folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=settings.folder) as file:
                self._file = os.dup(file.fileno())
        except OSError as error:
            raise ConfigError(
                f"scratch: expected a folder that can be written to, found {settings.folder}: {error}; name another one"
            ) from error
        # Not at the end of the interpreter: threads may still read then, and the system closes it anyway.
        weakref.finalize(self, os.close, self._file).atexit = False
        self._max_bytes = int(settings.max_bytes)
        self._folder = settings.folder
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._blocks: dict[int, _Block] = {}
        self._end = 0
        self._num_read = self._num_damaged = 0
        self._has_failed = False

    @property
    def statistics(self) -> ScratchStatistics:
        """What it did so far."""
        with self._lock:
            return ScratchStatistics(
                kept=len(self._blocks), file_bytes=self._end, read=self._num_read, damaged=self._num_damaged
            )

    def keep(self, row_group: int, records: RecordBatch | PackedRowGroup) -> None:
        """Write a row group, if it is not there yet and there is room."""
        if self._has_failed or row_group in self._blocks:
            return
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(records, protocol=5, buffer_callback=buffers.append)
        arrays = [buffer.raw() for buffer in buffers]
        head = pickle.dumps((pickled, [len(array) for array in arrays]))
        parts: list[bytes | memoryview] = []
        for array in (memoryview(head), *arrays):
            parts += [array, bytes(-len(array) % _ALIGNED_BYTES)]
        if len(parts) > _MOST_PARTS:
            parts = [b"".join(parts)]
        num_bytes, xxh3 = sum(map(len, parts)), self._start_xxh3()
        for part in parts:
            xxh3.update(part)
        # One at a time: the system lets one write to a file, and others that want to keep a core busy with waiting.
        with self._writing:
            if row_group in self._blocks or self._has_failed or self._end + num_bytes > self._max_bytes:
                return  # where this one has no room, a shorter one may
            try:
                written = os.pwritev(self._file, parts, self._end)
            except OSError as error:
                self._stop_keeping(str(error))
                return
            if written < num_bytes:
                self._stop_keeping(f"only {written} of {num_bytes} bytes could be written")
                return
            self._blocks[row_group] = _Block(self._end, num_bytes, len(head), xxh3.intdigest())
            self._end += num_bytes

    def find(self, row_group: int) -> Any:
        """The row group as it was kept; None where it was not, or is damaged."""
        block = self._blocks.get(row_group)
        if block is None:
            return None
        content = np.empty(block.num_bytes, dtype=np.uint8)
        try:
            num_bytes = os.preadv(self._file, [content.data], block.offset)
        except OSError as error:
            return self._drop(row_group, block, str(error))
        if num_bytes < block.num_bytes:
            return self._drop(row_group, block, f"expected {block.num_bytes} bytes, found {num_bytes}")
        xxh3 = self._start_xxh3(content.data)
        if xxh3.intdigest() != block.xxh3:
            return self._drop(row_group, block, "the bytes are not the ones that were written")
        pickled, lengths = pickle.loads(content[: block.head_bytes].data)
        arrays, start = [], block.head_bytes
        for length in lengths:
            start += -start % _ALIGNED_BYTES
            arrays.append(content[start : start + length].data)
            start += length
        with self._lock:
            self._num_read += 1
        return pickle.loads(pickled, buffers=arrays)

    def _drop(self, row_group: int, block: _Block, reason: str) -> None:
        with self._lock:
            if self._blocks.get(row_group) is not block:
                return  # another thread did, and may have kept it anew
            del self._blocks[row_group]
            self._num_damaged += 1
        _LOG.warning("scratch in %s: row group %d cannot be used, it is read anew: %s", self._folder, row_group, reason)

    def _stop_keeping(self, reason: str) -> None:
        self._has_failed = True
        _LOG.warning("scratch in %s: no more row groups are kept there: %s", self._folder, reason)
