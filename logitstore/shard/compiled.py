"""The compact codec's innermost loops as machine code, where numba is installed (`pip install logitstore[fast]`).

They give the same bits as NumPy does: masses are added up in the order of NumPy's sums, and what takes a logarithm
stays with NumPy. So it does not matter to a result whether, or from which row group on, they are used, and nothing is
loaded before as much has been decoded, or is going to be, as a command that looks at a few records never does.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

_LOG = logging.getLogger("logitstore.shard")
# Entries that NumPy decodes first, unless more are expected: it takes a third of a second for them. In the same time
# the loops are loaded, and compiled in that of four times as many.
PATIENCE_ENTRIES = 1 << 26
# NumPy adds up to 128 values in eight lanes; longer rows it halves before.
MOST_ENTRIES = 128
# What is made on the way stays in a core's cache.
ENTRIES_AT_A_TIME = 1 << 15


class Loops(NamedTuple):
    """The functions of this module's end, compiled; they let go of the interpreter's lock."""

    join_planes: Callable[[np.ndarray, np.ndarray], None]
    decode_rows: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], bool]
    add_to_rows: Callable[[np.ndarray, np.ndarray], None]


_counting = threading.Lock()
_loading = threading.Lock()
_entries_decoded = 0  # or expected


def expect_entries(number: int) -> None:
    """Say that so many entries are going to be decoded, so that the loops are loaded now if that is worth it."""
    global _entries_decoded
    with _counting:
        _entries_decoded += number


def find_loops(shape: tuple[int, int]) -> Loops | None:
    """The loops compiled; None where they are not to be had, not worth loading yet, or being loaded by another thread.

    Args:
        shape: of the steps that are to be decoded now.
    """
    global _entries_decoded
    if not 0 < shape[1] <= MOST_ENTRIES:
        return None
    with _counting:
        _entries_decoded += shape[0] * shape[1]
        is_patient = _entries_decoded < PATIENCE_ENTRIES
    if is_patient:
        return None
    if compile_loops.cache_info().currsize:
        return compile_loops()
    if not _loading.acquire(blocking=False):
        return None
    try:
        return compile_loops()
    finally:
        _loading.release()


@functools.lru_cache(maxsize=1)
def compile_loops() -> Loops | None:
    """The loops compiled, or loaded as they were compiled before; None where numba is missing or fits nothing here."""
    try:
        import numba
    except ImportError as error:
        _LOG.debug("NumPy decodes: %s", error)
        return None
    # Memory is read-only where it is Arrow's; other memory is taken too. Planes are slices, or every other byte.
    planes = numba.types.Array(numba.uint8, 2, "A", readonly=True)
    floats, doubles = (numba.types.Array(kind, 1, "C", readonly=True) for kind in (numba.float32, numba.float64))
    rows = numba.float32[:, ::1]
    return Loops(
        join_planes=_compile(join_planes, numba.void(planes, numba.int32[::1])),
        decode_rows=_compile(decode_rows, numba.boolean(planes, floats, doubles, rows, numba.float64[::1])),
        add_to_rows=_compile(add_to_rows, numba.void(floats, rows)),
    )


def _compile(loop: Callable[..., Any], signature: object) -> Callable[..., Any]:
    import numba

    try:
        compiled: Callable[..., Any] = numba.njit(signature, nogil=True, cache=True)(loop)
    except RuntimeError as error:  # no folder to keep it in
        _LOG.debug("compiled for this process alone: %s", error)
        compiled = numba.njit(signature, nogil=True)(loop)
    return compiled


def join_planes(planes: np.ndarray, values: np.ndarray) -> None:
    """Fill [N] int32 `values` from [2 to 4, N] uint8, their lowest bytes, …, their highest; those left out are 0."""
    lowest, low = planes[0], planes[1]
    if len(planes) == 2:
        for index in range(len(values)):
            values[index] = np.int32(lowest[index]) | np.int32(low[index]) << 8
        return
    high = planes[2]
    if len(planes) == 3:
        for index in range(len(values)):
            values[index] = np.int32(lowest[index]) | np.int32(low[index]) << 8 | np.int32(high[index]) << 16
        return
    highest = planes[3]
    for index in range(len(values)):
        values[index] = (
            np.int32(lowest[index])
            | np.int32(low[index]) << 8
            | np.int32(high[index]) << 16
            | np.int32(highest[index]) << 24
        )


def decode_rows(
    planes: np.ndarray, logprob_of: np.ndarray, prob_of: np.ndarray, logprobs: np.ndarray, mass: np.ndarray
) -> bool:
    """Undo the steps of supports of K entries each, at most `MOST_ENTRIES`.

    Args:
        planes: [2 or more, P · K] uint8, the low bytes of the steps and the high ones; further ones mean nothing.
        logprob_of, prob_of: [L] float32 nats and float64, of the first levels.
        logprobs: [P, K] float32, filled with every entry's logprob before rescaling.
        mass: [P] float64, filled with the sums of the positions' probabilities.
    Returns:
        False where a level is not in the tables: what was filled in is worth nothing.
    """
    num_positions, num_entries = logprobs.shape
    in_lanes = num_entries - num_entries % 8
    at_a_time = max(1, ENTRIES_AT_A_TIME // num_entries)
    joined = np.empty(at_a_time * num_entries, dtype=np.uint16)
    # Without signs, or the compiler looks at every index whether it counts from the end.
    num_levels = np.uint64(len(logprob_of))
    for start in range(0, num_positions, at_a_time):
        stop = min(start + at_a_time, num_positions)
        begin, end = start * num_entries, stop * num_entries
        low, high = planes[0, begin:end], planes[1, begin:end]
        for index in range(len(low)):
            joined[index] = np.uint16(low[index]) | np.uint16(high[index]) << 8
        for position in range(start, stop):
            first = (position - start) * num_entries
            steps, row = joined[first : first + num_entries], logprobs[position]
            level7 = np.uint64(0)
            lane0 = lane1 = lane2 = lane3 = lane4 = lane5 = lane6 = lane7 = 0.0
            for entry in range(0, in_lanes, 8):
                level0 = level7 + np.uint64(steps[entry])
                level1 = level0 + np.uint64(steps[entry + 1])
                level2 = level1 + np.uint64(steps[entry + 2])
                level3 = level2 + np.uint64(steps[entry + 3])
                level4 = level3 + np.uint64(steps[entry + 4])
                level5 = level4 + np.uint64(steps[entry + 5])
                level6 = level5 + np.uint64(steps[entry + 6])
                level7 = level6 + np.uint64(steps[entry + 7])
                if level7 >= num_levels:
                    return False
                row[entry], row[entry + 1] = logprob_of[level0], logprob_of[level1]
                row[entry + 2], row[entry + 3] = logprob_of[level2], logprob_of[level3]
                row[entry + 4], row[entry + 5] = logprob_of[level4], logprob_of[level5]
                row[entry + 6], row[entry + 7] = logprob_of[level6], logprob_of[level7]
                lane0 += prob_of[level0]
                lane1 += prob_of[level1]
                lane2 += prob_of[level2]
                lane3 += prob_of[level3]
                lane4 += prob_of[level4]
                lane5 += prob_of[level5]
                lane6 += prob_of[level6]
                lane7 += prob_of[level7]
            total = ((lane0 + lane1) + (lane2 + lane3)) + ((lane4 + lane5) + (lane6 + lane7))
            for entry in range(in_lanes, num_entries):
                level7 += np.uint64(steps[entry])
                if level7 >= num_levels:
                    return False
                row[entry] = logprob_of[level7]
                total += prob_of[level7]
            mass[position] = total
    return True


def add_to_rows(added: np.ndarray, rows: np.ndarray) -> None:
    """Add [P] float32 to [P, K] float32, to every entry of a row the same."""
    for row in range(len(rows)):
        for entry in range(rows.shape[1]):
            rows[row, entry] += added[row]
