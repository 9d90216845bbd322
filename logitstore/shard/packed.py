"""PackedRowGroup: records whose supports lie as their pages do until somebody wants them.

A stream holds many row groups at once and takes a record from each now and then. What it holds so takes half of the
memory that decoded supports would; a first batch waits for the supports of its own records and no others; and a support
is written once, to where it is wanted, instead of once when its row group is decoded and once when its batch is joined.
That is for supports that nothing was drawn for; those of the codec compact must all have equally many entries.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from logitstore.records import RecordBatch
from logitstore.shard import compact
from logitstore.shard.compiled import find_loops
from logitstore.shard.pages import Pages, join_planes


class PackedSupports:
    """Supports of P positions with N entries in all, in pages.

    Args:
        ids, values: the two columns, N values each.
        num_entries: of each position, where the values are steps of 16 bits, which have to be undone and rescaled; 0
            where they are logprobs.
    """

    def __init__(self, ids: Pages, values: Pages, num_entries: int) -> None:
        self._ids, self._values, self.num_entries = ids, values, num_entries

    def unpack(self, entries: slice, support_ids: np.ndarray, support_logprobs: np.ndarray, mass: np.ndarray) -> None:
        """Write the supports of some positions to where they are wanted; those made of steps are still to be rescaled.

        Args:
            entries: those of the positions, as a range of all N.
            support_ids, support_logprobs: int32 and float32, as many as there are entries, filled.
            mass: float64, as many as there are positions, filled with the mass of each support if it is to be rescaled.
        """
        loops = find_loops((len(mass), self.num_entries) if self.num_entries else (0, 1))
        for planes, part in _cut(self._ids, entries):
            join_planes(planes, support_ids[part], loops)
        for planes, part in _cut(self._values, entries):
            if not self.num_entries:
                join_planes(planes, support_logprobs[part].view(np.int32), loops)
                continue
            of_part = slice(part.start // self.num_entries, part.stop // self.num_entries)
            rows = support_logprobs[part].reshape(-1, self.num_entries)
            compact.undo_steps(planes, rows, mass[of_part], loops)


def _cut(pages: Pages, values: slice) -> Iterator[tuple[np.ndarray, slice]]:
    """[2 to 4, ·] planes of some values of a column, page by page, and where among them these are."""
    page, at = bisect_right(pages.starts, values.start) - 1, values.start
    while at < values.stop:
        first, end = pages.starts[page], min(pages.starts[page + 1], values.stop)
        yield pages.planes[page][:, at - first : end - first], slice(at - values.start, end - values.start)
        at, page = end, page + 1


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedRowGroup:
    """Records of which all but the supports is decoded.

    Attributes:
        columns: the batch; of its entries there are the counts and offsets, and no ids and logprobs.
        supports: those, of all its positions.
    """

    columns: RecordBatch
    supports: PackedSupports

    def __len__(self) -> int:
        return len(self.columns)

    def unpack(self) -> RecordBatch:
        """The batch with its supports."""
        ids, logprobs = (np.empty(int(self.columns.support_offsets[-1]), dtype=t) for t in (np.int32, np.float32))
        mass = np.empty(self.columns.num_positions)
        self.supports.unpack(slice(0, len(ids)), ids, logprobs, mass)
        if self.supports.num_entries:
            compact.rescale(mass, self.columns.tail_logprob, logprobs.reshape(len(mass), -1))
        return replace(self.columns, support_ids=ids, support_logprobs=logprobs)


def pack_supports(ids: Pages, values: Pages, support_counts: np.ndarray, *, are_steps: bool) -> PackedSupports | None:
    """Supports that nothing was drawn for, without decoding them; None where they have to be.

    Args:
        ids, values: the columns `support_ids`, and `support_steps` or `support_logprobs`.
        support_counts: [P] int32.
        are_steps: whether it is the former.
    """
    if {ids.starts[-1], values.starts[-1]} != {int(support_counts.sum())}:
        return None
    if not are_steps:
        return PackedSupports(ids, values, 0)
    num_entries = compact.find_uniform_count(support_counts)
    if not num_entries or not values.has_16_bits():
        return None
    if any(start % num_entries for start in values.starts):  # a position whose entries are in two pages
        return None
    return PackedSupports(ids, values, num_entries)
