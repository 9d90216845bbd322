"""The order of the stream, specified.

Given the number of records of every row group, a seed, and the size B of the global batch:

1. *Lanes.* L is the largest divisor of B that exceeds neither the `lanes` setting nor the number of row groups.
2. *Dealing.* In epoch e the row groups are permuted by a Philox generator keyed with (seed, e) (see `permute`), and
   dealt to the lanes like cards: lane l gets the permuted row groups l, l + L, l + 2L, …
3. *Windows.* Each lane is cut into windows of w = `window_row_groups` consecutive row groups; only the first window of
   lane l has 1 + (l mod w), so that not all lanes begin a window at once. The records of a window are shuffled
   together, by a generator keyed with (seed, e, lane, window).
4. *Rounds.* Round r takes record r of every lane that has that many, in lane order. All rounds joined are the epoch:
   every record exactly once.
5. *Batches.* Global batch b of an epoch is the slice [bB, (b+1)B) of that, rearranged lane by lane. As long as no lane
   has run out, that is the same number of records from every lane.
6. *Ranks.* Rank r of W takes the slice [rB/W, (r+1)B/W) of a global batch: whole lanes when W divides L, so that each
   row group is read by one rank.
7. *Tail.* The records after the last full batch of an epoch are dropped (they differ from epoch to epoch), or kept as
   one short batch where a reader asks for it. Nothing is ever repeated.

So the whole state of a reader is one integer, the step, and neither the number of ranks nor of threads changes a batch.
Memory is a few integers per row group, and the records of one window per lane.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from logitstore.errors import ConfigError

# 256 lanes mix well, divide by all usual world sizes, and cost one open row group each.
DEFAULT_LANES = 256
DEFAULT_WINDOW_ROW_GROUPS = 2
_DEAL, _SHUFFLE = 0, 1
# Shuffled windows kept: more than lanes, so that neighbouring batches find theirs.
_WINDOWS_KEPT = 1024


def permute(length: int, *key: int) -> np.ndarray:
    """A permutation of range(length), [length] int64, decided by a tuple of non-negative integers.

    The same on every machine and for ever: it sorts the raw output of a Philox generator, which is specified, where
    NumPy's own shuffling may change between releases.
    """
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=16).digest()
    draws = np.random.Philox(key=np.frombuffer(digest, dtype="<u8")).random_raw(length)
    return np.argsort(draws, kind="stable")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Where the records of a global batch are: row group (0-based in the order's list) and record in it, [B] int64."""

    row_groups: np.ndarray
    records: np.ndarray

    def __len__(self) -> int:
        return len(self.row_groups)

    def slice(self, rank: int, world_size: int) -> Batch:
        """The part of one rank; parts differ by at most one record where the batch is short."""
        start, stop = rank * len(self) // world_size, (rank + 1) * len(self) // world_size
        return Batch(row_groups=self.row_groups[start:stop], records=self.records[start:stop])


class StreamOrder:
    """Order of all records over all epochs; see the module's specification.

    Args:
        row_group_records: [G] records of each row group.
        global_batch_sequences: B.
        seed: any non-negative integer.
        lanes: upper limit of L.
        window_row_groups: row groups shuffled together.
    Raises:
        ConfigError: the row groups hold fewer records than one batch, or a number is out of range.
    """

    def __init__(
        self,
        row_group_records: np.ndarray,
        *,
        global_batch_sequences: int,
        seed: int,
        lanes: int = DEFAULT_LANES,
        window_row_groups: int = DEFAULT_WINDOW_ROW_GROUPS,
    ) -> None:
        self.row_group_records = np.asarray(row_group_records, dtype=np.int64)
        self.global_batch_sequences = global_batch_sequences
        self.seed = seed
        self.num_records = int(self.row_group_records.sum())
        if global_batch_sequences < 1 or lanes < 1 or window_row_groups < 1 or seed < 0:
            raise ConfigError(
                f"stream: expected a positive batch, lanes and window and a seed of 0 or more, found "
                f"{global_batch_sequences}, {lanes}, {window_row_groups} and {seed}"
            )
        if self.num_records < global_batch_sequences:
            raise ConfigError(
                f"stream: one global batch takes {global_batch_sequences} sequences, the row groups hold "
                f"{self.num_records}; use a smaller global_batch_sequences or a larger store"
            )
        most = min(lanes, len(self.row_group_records))
        self.num_lanes = max(d for d in range(1, most + 1) if global_batch_sequences % d == 0)
        self.window_row_groups = window_row_groups
        self._epochs: dict[int, _Epoch] = {}

    @property
    def batches_per_epoch(self) -> int:
        """Full batches of an epoch."""
        return self.num_records // self.global_batch_sequences

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the order, short of the records' contents."""
        key = (self.global_batch_sequences, self.seed, self.num_lanes, self.window_row_groups)
        digest = hashlib.sha256(repr(key).encode())
        digest.update(self.row_group_records.astype("<i8").tobytes())
        return digest.hexdigest()

    def compute_batch(self, step: int) -> Batch:
        """Global batch of a 0-based step, counted over all epochs."""
        epoch, batch = divmod(step, self.batches_per_epoch)
        return self.compute_epoch_batch(epoch, batch)

    def compute_epoch_batch(self, epoch: int, batch: int) -> Batch:
        """Batch of an epoch; number `batches_per_epoch` is the short rest, which may be empty."""
        start = batch * self.global_batch_sequences
        stop = min(start + self.global_batch_sequences, self.num_records)
        return self._open_epoch(epoch).locate(start, stop)

    def find_last_step(self, step: int, row_group: int) -> int:
        """The last step, in the epoch of `step`, that needs a row group which that epoch's batches have reached."""
        epoch = step // self.batches_per_epoch
        return epoch * self.batches_per_epoch + self._open_epoch(epoch).find_last_batch(row_group)

    def _open_epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            # Read-ahead crosses into the next epoch while the current one is still being served.
            self._epochs = {e: opened for e, opened in self._epochs.items() if abs(e - epoch) <= 1}
            self._epochs[epoch] = _Epoch(self, epoch)
        return self._epochs[epoch]


class _Epoch:
    """The dealt lanes of one epoch and the shuffled windows last used."""

    def __init__(self, order: StreamOrder, epoch: int) -> None:
        self.epoch = epoch
        self._order = order
        lanes = order.num_lanes
        self._dealt = permute(len(order.row_group_records), order.seed, epoch, _DEAL)
        records = order.row_group_records[self._dealt]
        self._lane_lengths = np.array([records[lane::lanes].sum() for lane in range(lanes)])
        self._sorted_lengths = np.sort(self._lane_lengths)
        self._length_sums = np.concatenate([[0], np.cumsum(self._sorted_lengths)])
        # [lane] -> first record of every window of the lane, and the lane's length at the end
        self._window_starts = [self._cut_windows(lane, records[lane::lanes]) for lane in range(lanes)]
        self._place_of_row_group = np.argsort(self._dealt)
        self._windows: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def _cut_windows(self, lane: int, records: np.ndarray) -> np.ndarray:
        cuts = np.arange(self._first_window(lane), len(records), self._order.window_row_groups)
        return np.concatenate([[0], np.cumsum(np.add.reduceat(records, np.concatenate([[0], cuts])))])

    def _first_window(self, lane: int) -> int:
        """Row groups in the first window of a lane."""
        return 1 + lane % self._order.window_row_groups

    def find_last_batch(self, row_group: int) -> int:
        """The batch of this epoch in which the window of a row group ends."""
        lane_place, lane = divmod(int(self._place_of_row_group[row_group]), self._order.num_lanes)
        behind = lane_place - self._first_window(lane)
        window = 0 if behind < 0 else 1 + behind // self._order.window_row_groups
        round_index = int(self._window_starts[lane][window + 1]) - 1
        alive = np.flatnonzero(self._lane_lengths > round_index)
        position = self._count_before(round_index) + int(np.searchsorted(alive, lane))
        return position // self._order.global_batch_sequences

    def locate(self, start: int, stop: int) -> Batch:
        """Records [start, stop) of the epoch's rounds, rearranged lane by lane."""
        picked: list[tuple[int, int]] = []
        position, round_index = start, self._find_round(start)
        while position < stop:
            alive = np.flatnonzero(self._lane_lengths > round_index)
            offset = position - self._count_before(round_index)
            taken = alive[offset : offset + stop - position]
            picked.extend((int(lane), round_index) for lane in taken)
            position += len(taken)
            round_index += 1
        picked.sort()
        places = [self._find_record(lane, index) for lane, index in picked]
        row_groups = np.array([row_group for row_group, _ in places], dtype=np.int64)
        return Batch(row_groups=row_groups, records=np.array([record for _, record in places], dtype=np.int64))

    def _count_before(self, round_index: int) -> int:
        """Records of all rounds before this one: the sum over lanes of min(length, round)."""
        ended = int(np.searchsorted(self._sorted_lengths, round_index, side="right"))
        return int(self._length_sums[ended]) + (len(self._sorted_lengths) - ended) * round_index

    def _find_round(self, position: int) -> int:
        low, high = 0, int(self._sorted_lengths[-1])
        while low < high:
            middle = (low + high + 1) // 2
            if self._count_before(middle) <= position:
                low = middle
            else:
                high = middle - 1
        return low

    def _find_record(self, lane: int, index: int) -> tuple[int, int]:
        window = int(np.searchsorted(self._window_starts[lane], index, side="right")) - 1
        row_groups, records = self._shuffle_window(lane, window)
        slot = index - int(self._window_starts[lane][window])
        return int(row_groups[slot]), int(records[slot])

    def _shuffle_window(self, lane: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        key = (lane, window)
        if key in self._windows:
            self._windows.move_to_end(key)
            return self._windows[key]
        stop = self._first_window(lane) + window * self._order.window_row_groups
        start = stop - self._order.window_row_groups if window else 0
        members = self._dealt[lane :: self._order.num_lanes][start:stop]
        counts = self._order.row_group_records[members]
        row_groups = np.repeat(members, counts)
        records = np.concatenate([np.arange(count) for count in counts])
        shuffled = permute(len(records), self._order.seed, self.epoch, _SHUFFLE, lane, window)
        self._windows[key] = row_groups[shuffled], records[shuffled]
        while len(self._windows) > _WINDOWS_KEPT:
            self._windows.popitem(last=False)
        return self._windows[key]
