"""Statistics of a store, summed from its manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from logitstore.shard.layout import SCHEMA as SHARD_SCHEMA
from logitstore.shard.layout import UnknownScalar
from logitstore.store.manifest import Manifest

_COUNTS = (
    "records",
    "positions",
    "taught_positions",
    "support_entries",
    "impossible_tokens",
    "file_bytes",
    "documents",
    "recorded_documents",
)
_MASSES = ("entropy_sum", "tail_mass_sum", "next_token_logprob_sum")
_LISTS = ("column_bytes", "entropy_histogram", "tail_histogram")


@dataclass(frozen=True, kw_only=True)
class StoreStatistics:
    """Sums over a manifest; `bytes` are those of the shards, everything in them included.

    `mean_entropy` and `teacher_loss` are in nats, None in a store whose source did not tell them.
    """

    records: int
    positions: int
    taught_positions: int
    support_entries: int
    bytes: int
    column_bytes: dict[str, int]
    documents: int
    recorded_documents: int
    dead_letters: dict[str, int]
    mean_entropy: float | None
    mean_tail_mass: float
    teacher_loss: float | None
    impossible_tokens: int
    entropy_histogram: tuple[int, ...]
    tail_histogram: tuple[int, ...]

    @property
    def bytes_per_position(self) -> float:
        return self.bytes / max(1, self.positions)


def compute_statistics(
    manifest: Manifest, source: str | None = None, unknown_scalars: Collection[UnknownScalar] = ()
) -> StoreStatistics:
    """Sums over a whole manifest, or over the units of one source; reads nothing of the store."""
    counts: Counter[str] = Counter()
    masses = dict.fromkeys(_MASSES, 0.0)
    sums_of_lists = dict.fromkeys(_LISTS, np.zeros(1, np.int64))
    dead_letters: Counter[str] = Counter()
    for table in manifest.file.iterate(["source", *_COUNTS, *_MASSES, *_LISTS, "dead_letter_counts"]):
        rows = table if source is None else table.filter(pc.equal(table["source"], source))
        counts.update({name: pc.sum(rows[name]).as_py() or 0 for name in _COUNTS})
        for name in _MASSES:
            masses[name] += pc.sum(rows[name]).as_py() or 0.0
        for name in _LISTS:
            sums_of_lists[name] = sums_of_lists[name] + _sum_lists(rows[name])
        for entry in pc.value_counts(rows["dead_letter_counts"].drop_null()).to_pylist():
            dead_letters.update({r: entry["counts"] * n for r, n in json.loads(entry["values"]).items()})
    positions = counts["positions"]
    is_loss_known = "next_token_logprob" not in unknown_scalars
    loss = -masses["next_token_logprob_sum"] / max(1, positions - counts["impossible_tokens"])
    columns = {name: values.tolist() if values.any() else [] for name, values in sums_of_lists.items()}
    return StoreStatistics(
        records=counts["records"],
        positions=positions,
        taught_positions=counts["taught_positions"],
        support_entries=counts["support_entries"],
        bytes=counts["file_bytes"],
        column_bytes={n: size for n, size in zip(SHARD_SCHEMA.names, columns["column_bytes"], strict=False) if size},
        documents=counts["documents"],
        recorded_documents=counts["recorded_documents"],
        dead_letters=dict(sorted(dead_letters.items())),
        mean_entropy=None if "entropy" in unknown_scalars else masses["entropy_sum"] / max(1, positions),
        mean_tail_mass=masses["tail_mass_sum"] / max(1, positions),
        teacher_loss=loss if is_loss_known else None,
        impossible_tokens=counts["impossible_tokens"],
        entropy_histogram=tuple(columns["entropy_histogram"]),
        tail_histogram=tuple(columns["tail_histogram"]),
    )


def _sum_lists(lists: pa.ChunkedArray) -> np.ndarray | int:
    """[N] sums of lists of N elements each; 0 where there is none. Null and empty lists count nothing."""
    num_lists = pc.sum(pc.greater(pc.list_value_length(lists), 0)).as_py()
    if not num_lists:
        return 0
    values = np.concatenate([chunk.flatten().to_numpy() for chunk in lists.chunks])
    sums: np.ndarray = values.reshape(num_lists, -1).sum(axis=0)
    return sums
