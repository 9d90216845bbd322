"""BatchMemory: the memory of batches that nobody holds any more, for those that come.

A batch has megabytes, and memory that a process has not had before costs as much time as decompressing into it: the
system clears every page of it.
"""

from __future__ import annotations

from collections import deque

import numpy as np

# Arrays: those of a batch, of one that was just let go of, and one to spare.
_MOST_KEPT = 5
# Smaller arrays come from memory that the process has anyway.
_LEAST_BYTES = 1 << 17
# What is kept may be so many times as large as what is asked for.
_MOST_TIMES = 2


class BatchMemory:
    """Arrays in memory that is used again once nothing refers to it: neither they, nor views of them, nor tensors.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=_MOST_KEPT)  # the oldest falls out

    def take(self, length: int, dtype: type[np.generic]) -> np.ndarray:
        """[length] of a type, with whatever was there before."""
        num_bytes = length * np.dtype(dtype).itemsize
        if num_bytes < _LEAST_BYTES:
            return np.empty(length, dtype=dtype)
        lent = _Lent(self._find(num_bytes), self._free)
        array: np.ndarray = np.asarray(lent)[:num_bytes].view(dtype)
        return array

    def _find(self, num_bytes: int) -> np.ndarray:
        while True:
            try:
                block = self._free.popleft()
            except IndexError:
                return np.empty(num_bytes + num_bytes // 8, dtype=np.uint8)  # the next one may be a little larger
            if num_bytes <= len(block) <= _MOST_TIMES * num_bytes:
                return block


class _Lent:
    """What arrays in a block of memory refer to; goes back when the last of them is gone."""

    def __init__(self, block: np.ndarray, free: deque[np.ndarray]) -> None:
        self._block, self._free = block, free
        self.__array_interface__ = block.__array_interface__

    def __del__(self) -> None:
        self._free.append(self._block)
