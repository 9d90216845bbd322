"""The arithmetic of the compact codec: supports as levels on a scale, and floats of nine significant bits.

Rounding costs a KL divergence of about half the sum of p·ε² over the slots, ε the error of a logprob. For a given size
it is least where every slot costs the same, so steps grow as 1/√p: levels are even in √p, 640 to the unit. Below
p = 1/6400, where a step has grown to 1/4 nat, it stays at 1/4, so that the unlikely slots are not lost to a loss that
weighs them more than the teacher did.

    level n ≤ 632:  p = (1 − n/640)²
    level n > 632:  log p = −log 6400 − (n − 632)/4

Each slot is rounded to its nearest level by itself, so errors do not add up from slot to slot. Levels do not fall
within a position; what is stored is each slot's level less that of the slot before (of 0 for the first): mostly small
numbers. Slots of equal level are put in order of their ids, which compress better so.
"""

from __future__ import annotations

import functools

import numpy as np

from logitstore.shard.compiled import ENTRIES_AT_A_TIME, Loops, find_loops

_ROOT_LEVELS = 640
_BREAK_LEVEL = 632
_BREAK_ROOT = 1 - _BREAK_LEVEL / _ROOT_LEVELS
_BREAK_LOGPROB = 2 * np.log(_BREAK_ROOT)
_TAIL_LEVELS_PER_NAT = 4.0
SIGNIFICANT_BITS = 9
_LOWEST_LOGPROB = -1e6
MAX_STEP = 2**16 - 1
# The tables of levels are at least this long: down to 330 nats, which few positions exceed.
_TABLE_LEVELS = 2048
# 1 in each of the four 16-bit parts of a word.
_FOUR_ONES = np.uint64(0x0001000100010001)
# Mass missed by a teacher's own arithmetic, 1e-4 (see the invariants), and by rounding a tail t, 2^-9 · |t|·e^t.
_MASS_SLACK = 1e-3
# The bound counts errors to first order, and is evaluated at rounded values where the originals are gone.
_BOUND_SLACK = 1.25


def round_scalars(values: np.ndarray) -> np.ndarray:
    """Float32 values rounded to nine significant bits, ties to even; infinities and NaN stay what they are."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    dropped = 24 - SIGNIFICANT_BITS
    half = (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)
    rounded = (((bits + half) >> dropped) << dropped).view(np.float32)
    rounded[np.isnan(values)] = np.nan
    return rounded


def compute_levels(logprobs: np.ndarray) -> np.ndarray:
    """[N] int32, the nearest level of each logprob; of one outside of [-1e6, 0] that of the nearer end."""
    with np.errstate(invalid="ignore"):
        clipped = np.clip(logprobs, np.float32(_LOWEST_LOGPROB), np.float32(0.0))
        root = _ROOT_LEVELS - np.float32(_ROOT_LEVELS) * np.exp(np.float32(0.5) * clipped)
        tail = np.float32(_BREAK_LEVEL) + np.float32(_TAIL_LEVELS_PER_NAT) * (np.float32(_BREAK_LOGPROB) - clipped)
        levels: np.ndarray = np.rint(np.where(clipped >= _BREAK_LOGPROB, root, tail)).astype(np.int32)
    return levels


def compute_level_logprobs(levels: np.ndarray) -> np.ndarray:
    """[...] float64 nats, the logprob of each level before rescaling."""
    levels = np.asarray(levels, dtype=np.float64)
    root = 2 * np.log1p(-np.minimum(levels, _BREAK_LEVEL) / _ROOT_LEVELS)
    logprobs: np.ndarray = root - np.maximum(levels - _BREAK_LEVEL, 0) / _TAIL_LEVELS_PER_NAT
    return logprobs


def encode_supports(ids: np.ndarray, logprobs: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and steps of supports.

    Args:
        ids: [N] int32.
        logprobs: [N] float32, nats, likeliest first at each position.
        counts: [P] int32, entries at each position, N in all.
    Returns:
        [N] int32, the ids, those of slots of equal level in ascending order; [N] uint16, the steps. A step that is too
        long, or negative because logprobs rise, is cut off: the decoded value then misses the codec's bound.
    """
    levels = compute_levels(logprobs)
    steps = np.empty_like(levels)
    np.subtract(levels[1:], levels[:-1], out=steps[1:])
    starts = _find_starts(counts)
    steps[starts] = levels[starts]
    begins = steps != 0
    begins[starts] = True
    return _sort_runs(ids, begins, counts), np.clip(steps, 0, MAX_STEP).astype(np.uint16)


def _sort_runs(ids: np.ndarray, begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[N] int32, ids sorted within runs; `begins` marks where runs begin, which each position does."""
    keys = np.cumsum(begins) << 32 | ids.astype(np.uint32)
    uniform = find_uniform_count(counts)
    keys = np.sort(keys.reshape(-1, uniform), axis=1).ravel() if uniform else np.sort(keys)
    return (keys & 0xFFFFFFFF).astype(np.uint32).view(np.int32)


def decode_steps(steps: np.ndarray, counts: np.ndarray, tail_logprob: np.ndarray) -> np.ndarray:
    """Logprobs of encoded supports: undo the steps, and rescale each support to the mass that its tail leaves.

    Args:
        steps: [N] integers of 16 bits without a sign, as such or in more bits.
        counts: [P] int32, entries at each position, N in all.
        tail_logprob: [P] float32, nats. Where it leaves nothing (0 or more), or the support's mass is nothing that
            float32 can hold, nothing is rescaled.
    Returns:
        [N] float32, nats.
    Raises:
        ValueError: a step is negative or has more than 16 bits.
    """
    if not len(steps):
        return np.zeros(0, dtype=np.float32)
    check_16_bits(steps, "steps")
    uniform = find_uniform_count(counts)
    if uniform:
        rows, mass = steps.reshape(-1, uniform), np.empty(len(counts))
        decoded = np.empty(rows.shape, dtype=np.float32)
        if (loops := find_loops(rows.shape)) is None:
            _undo_by_numpy(rows, decoded, mass)
        else:
            undo_steps(steps.astype("<u2", copy=False).view(np.uint8).reshape(-1, 2).T, decoded, mass, loops)
        rescale(mass, tail_logprob, decoded)
        return decoded.ravel()
    levels = _sum_steps(steps, counts)
    logprob_of, prob_of = _build_tables(max(_TABLE_LEVELS, int(levels.max()) + 1))
    filled = counts > 0
    shift = _compute_shift(sum_positions(prob_of[levels], counts), tail_logprob[filled])
    ragged: np.ndarray = logprob_of[levels]
    ragged += np.repeat(shift, counts[filled])
    return ragged


def check_16_bits(values: np.ndarray, name: str) -> None:
    """Raise a ValueError where numbers of 16 bits without a sign, that may come in more bits, are none."""
    if values.dtype == np.uint16 or not len(values):
        return
    largest = int(values.view(f"u{values.itemsize}").max())  # a negative number is a large one
    if largest > MAX_STEP:
        raise ValueError(f"expected {name} up to {MAX_STEP}, found {largest}")


def undo_steps(planes: np.ndarray, logprobs: np.ndarray, mass: np.ndarray, loops: Loops | None) -> None:
    """Fill [P, K] float32 `logprobs`, which are still to be rescaled, and [P] float64 `mass`, that of each support.

    Args:
        planes: [2 or more, P · K] uint8, low and high bytes of the steps, of 16 bits.
        loops: what does it; NumPy where there are none, and where levels are far down.
    """
    if loops is not None and loops.decode_rows(planes, *_build_tables(_TABLE_LEVELS), logprobs, mass):
        return
    steps = planes[0].astype(np.uint16)
    steps |= planes[1].astype(np.uint16) << np.uint16(8)
    _undo_by_numpy(steps.reshape(logprobs.shape), logprobs, mass)


def _undo_by_numpy(steps: np.ndarray, logprobs: np.ndarray, mass: np.ndarray) -> None:
    """The same from [P, K] steps; in parts that stay in a core's cache, which takes half the time."""
    rows = max(1, ENTRIES_AT_A_TIME // steps.shape[1])
    sums = _RowSums(min(rows, len(steps)), steps.shape[1])
    for start in range(0, len(steps), rows):
        part = slice(start, start + rows)
        mass[part] = sums.decode(steps[part], logprobs[part])


def rescale(mass: np.ndarray, tail_logprob: np.ndarray, logprobs: np.ndarray) -> None:
    """Rescale supports of equally many entries to the mass that their tails leave.

    Args:
        mass: [P] float64, of each support, as `undo_steps` found it.
        tail_logprob: [P] float32, nats.
        logprobs: [P, K] float32 nats, changed.
    """
    shift = _compute_shift(mass, tail_logprob)
    if (loops := find_loops((0, logprobs.shape[1]))) is not None:
        loops.add_to_rows(shift, logprobs)
    else:
        logprobs += shift[:, None]


def _compute_shift(mass: np.ndarray, tail_logprob: np.ndarray) -> np.ndarray:
    """[P'] float32 nats, what rescales a support to the mass that its tail leaves; 0 where nothing is rescaled."""
    left = -np.expm1(np.minimum(tail_logprob, 0.0).astype(np.float64))
    can_rescale = (left > 0) & (mass > 0)
    shift: np.ndarray = np.log(np.where(can_rescale, left, 1.0) / np.where(can_rescale, mass, 1.0)).astype(np.float32)
    return shift


def bound_logprobs(logprobs: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How far decoded logprobs may be from these: half a step, and what rescaling moves.

    Half a step is h = min(1/(640·√p), 1/8). A support whose entries are each off by at most h has a mass that is off by
    at most Σ p·h, and rescaling makes up for just that, for the rounding of the tail, and for what the teacher's
    probabilities miss 1 by. All of it to first order, with a quarter on top.

    Args:
        logprobs: [N] float32, nats.
        counts: [P] int32, entries at each position, N in all.
    Returns:
        [N] float32, nats.
    """
    if not len(logprobs):
        return np.zeros(0, dtype=np.float32)
    with np.errstate(invalid="ignore"):
        roots = np.exp(np.float32(0.5) * np.clip(logprobs, -80.0, 0.0))
    half_steps = np.minimum(np.float32(1 / _ROOT_LEVELS) / roots, np.float32(0.5 / _TAIL_LEVELS_PER_NAT))
    probs = roots * roots
    mass = sum_positions(probs, counts)
    moved = (sum_positions(probs * half_steps, counts) + _MASS_SLACK) / mass
    bound: np.ndarray = half_steps + np.repeat(moved.astype(np.float32), counts[counts > 0])
    bound *= np.float32(_BOUND_SLACK)
    return bound


def _find_starts(counts: np.ndarray) -> np.ndarray:
    """[P'] int64, the first entry of every position that has entries."""
    filled = counts[counts > 0].astype(np.int64)
    return np.cumsum(filled) - filled


def find_uniform_count(counts: np.ndarray) -> int:
    """Entries per position where all have equally many, else 0."""
    return int(counts[0]) if len(counts) and (counts == counts[0]).all() else 0


def sum_positions(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[P'] float64, sums over the entries of every position that has entries."""
    uniform = find_uniform_count(counts)
    if uniform:
        sums: np.ndarray = values.reshape(-1, uniform).sum(axis=1, dtype=np.float64)
        return sums
    return np.add.reduceat(values, _find_starts(counts), dtype=np.float64)


def _sum_steps(steps: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[N] int64, the level of every entry."""
    sums = np.cumsum(steps, dtype=np.int64)
    starts = _find_starts(counts)
    levels: np.ndarray = sums - np.repeat(sums[starts] - steps[starts], counts[counts > 0])
    return levels


class _RowSums:
    """Sums along rows of steps, in memory that is used again: to have it anew takes longer than the sums.

    NumPy adds up a row one by one. Where all sums fit into 16 bits, a product with 0x0001000100010001 adds up four
    steps of a word at once, and what is left to do one by one are the words.

    Args:
        rows, length: of the largest array of steps.
    """

    def __init__(self, rows: int, length: int) -> None:
        self.shape = (rows, length)
        self._levels = np.empty(self.shape, dtype=np.intp)
        self._probs = np.empty(self.shape)
        self._steps = np.empty(self.shape, dtype="<u2")
        self._totals, self._before = (np.empty((rows, length // 4), dtype="<u8") for _ in range(2))

    def compute(self, steps: np.ndarray) -> tuple[np.ndarray, int]:
        """[P, K] the sums along rows of steps below 2^16, valid until the next call, and the largest."""
        levels = self._levels[: len(steps)]
        if steps.shape[1] % 4 or int(steps.max()) * steps.shape[1] > MAX_STEP:
            np.cumsum(steps, axis=1, dtype=np.intp, out=levels)
        else:
            short, totals, before = (part[: len(steps)] for part in (self._steps, self._totals, self._before))
            short[...] = steps
            words = short.view("<u8")
            words *= _FOUR_ONES
            np.right_shift(words, np.uint64(48), out=totals)
            np.cumsum(totals, axis=1, out=before)
            before -= totals
            before *= _FOUR_ONES
            words += before
            levels[...] = short
        return levels, int(levels[:, -1].max())

    def decode(self, steps: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        """[P] float64, the masses of supports before rescaling; fills [P, K] `logprobs`, as `compiled.decode_rows`."""
        levels, largest = self.compute(steps)
        logprob_of, prob_of = _build_tables(max(_TABLE_LEVELS, largest + 1))
        probs = self._probs[: len(steps)]
        # All levels are in range; with "clip" NumPy writes them at once to where they go.
        np.take(logprob_of, levels, out=logprobs, mode="clip")
        np.take(prob_of, levels, out=probs, mode="clip")
        mass: np.ndarray = probs.sum(axis=1)
        return mass


@functools.lru_cache(maxsize=2)
def _build_tables(num_levels: int) -> tuple[np.ndarray, np.ndarray]:
    """[num_levels] float32 and float64: logprob and probability of the first levels."""
    logprobs = compute_level_logprobs(np.arange(num_levels))
    with np.errstate(under="ignore"):
        return logprobs.astype(np.float32), np.exp(logprobs).astype(np.float32).astype(np.float64)
