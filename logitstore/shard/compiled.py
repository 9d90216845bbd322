"""The compact codec's innermost loop as machine code, where numba is installed (`pip install logitstore[fast]`).

It gives the same bits as NumPy does: masses are added up in the order of NumPy's sums, and what takes a logarithm
stays with NumPy. So it does not matter to a result whether, or from which row group on, it is used, and nothing is
loaded before as much has been decoded as a command that looks at a few records never does.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable

import numpy as np

_LOG = logging.getLogger("logitstore.shard")
# Entries that NumPy decodes first: a third of a second, and more than a first batch of a stream mostly takes. In the
# time of twice as many it is loaded, and compiled in that of ten times.
PATIENCE_ENTRIES = 1 << 26
# NumPy adds up to 128 values in eight lanes; longer rows it halves before.
MOST_ENTRIES = 128

DecodeRows = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], bool]

_counting = threading.Lock()
_loading = threading.Lock()
_entries_decoded = 0


def find_decode_rows(shape: tuple[int, int]) -> DecodeRows | None:
    """`decode_rows` compiled; None where it is not to be had, not worth loading yet, or being loaded by another thread.

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
    if compile_decode_rows.cache_info().currsize:
        return compile_decode_rows()
    if not _loading.acquire(blocking=False):
        return None
    try:
        return compile_decode_rows()
    finally:
        _loading.release()


@functools.lru_cache(maxsize=1)
def compile_decode_rows() -> DecodeRows | None:
    """`decode_rows` compiled, or loaded as it was compiled before; None where numba is missing or fits nothing here.

    It lets go of the interpreter's lock.
    """
    try:
        import numba
    except ImportError as error:
        _LOG.debug("NumPy decodes: %s", error)
        return None
    steps, floats, doubles = (
        numba.types.Array(kind, dimensions, "C", readonly=True)  # as Arrow's are; others are taken too
        for kind, dimensions in ((numba.int32, 2), (numba.float32, 1), (numba.float64, 1))
    )
    signature = numba.boolean(steps, floats, doubles, numba.float32[:, ::1], numba.float64[::1])
    try:
        compiled: DecodeRows = numba.njit(signature, nogil=True, cache=True)(decode_rows)
    except RuntimeError as error:  # no folder to keep it in
        _LOG.debug("compiled for this process alone: %s", error)
        compiled = numba.njit(signature, nogil=True)(decode_rows)
    return compiled


def decode_rows(
    steps: np.ndarray, logprob_of: np.ndarray, prob_of: np.ndarray, logprobs: np.ndarray, mass: np.ndarray
) -> bool:
    """Undo the steps of supports of K entries each, at most `MOST_ENTRIES`.

    Args:
        steps: [P, K] int32.
        logprob_of, prob_of: [L] float32 nats and float64, of the first levels.
        logprobs: [P, K] float32, filled with every entry's logprob before rescaling.
        mass: [P] float64, filled with the sums of the positions' probabilities.
    Returns:
        False where a step is no number of 16 bits or a level is not in the tables: what was filled in is worth nothing.
    """
    num_entries = steps.shape[1]
    in_lanes = num_entries - num_entries % 8 if num_entries >= 8 else 0
    probs = np.empty(num_entries)
    for position in range(len(steps)):
        level = 0
        for entry in range(num_entries):
            step = steps[position, entry]
            level += step
            if step & ~0xFFFF or level >= len(logprob_of):
                return False
            logprobs[position, entry] = logprob_of[level]
            probs[entry] = prob_of[level]
        total = 0.0
        if in_lanes:
            lane0, lane1, lane2, lane3 = probs[0], probs[1], probs[2], probs[3]
            lane4, lane5, lane6, lane7 = probs[4], probs[5], probs[6], probs[7]
            for entry in range(8, in_lanes, 8):
                lane0 += probs[entry]
                lane1 += probs[entry + 1]
                lane2 += probs[entry + 2]
                lane3 += probs[entry + 3]
                lane4 += probs[entry + 4]
                lane5 += probs[entry + 5]
                lane6 += probs[entry + 6]
                lane7 += probs[entry + 7]
            total = ((lane0 + lane1) + (lane2 + lane3)) + ((lane4 + lane5) + (lane6 + lane7))
        for entry in range(in_lanes, num_entries):
            total += probs[entry]
        mass[position] = total
    return True
