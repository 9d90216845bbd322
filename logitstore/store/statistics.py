"""Statistics of a store, summed from its manifest."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from logitstore.shard.layout import SCHEMA as SHARD_SCHEMA
from logitstore.store.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class StoreStatistics:
    """Sums over a manifest; `bytes` are those of the shards, everything in them included. Entropies in nats."""

    records: int
    positions: int
    taught_positions: int
    support_entries: int
    bytes: int
    column_bytes: dict[str, int]
    documents: int
    recorded_documents: int
    dead_letters: dict[str, int]
    mean_entropy: float
    mean_tail_mass: float
    teacher_loss: float
    impossible_tokens: int
    entropy_histogram: tuple[int, ...]
    tail_histogram: tuple[int, ...]

    @property
    def bytes_per_position(self) -> float:
        return self.bytes / max(1, self.positions)


def compute_statistics(manifest: Manifest, source: str | None = None) -> StoreStatistics:
    """Sums over a whole manifest, or over the units of one source; reads nothing."""
    table, units = manifest.table, manifest.per_unit
    if source is not None:
        table = table.filter(pc.equal(table["source"], source))
        units = units.filter(pc.equal(units["source"], source))
    positions = _sum(table, "positions")
    impossible = _sum(table, "impossible_tokens")
    dead_letters: Counter[str] = Counter()
    for counts in units["dead_letter_counts"].to_pylist():
        dead_letters.update(json.loads(counts))
    return StoreStatistics(
        records=_sum(table, "records"),
        positions=positions,
        taught_positions=_sum(table, "taught_positions"),
        support_entries=_sum(table, "support_entries"),
        bytes=_sum(units, "file_bytes"),
        column_bytes=dict(zip(SHARD_SCHEMA.names, _sum_lists(units, "column_bytes"), strict=False)),
        documents=_sum(units, "documents"),
        recorded_documents=_sum(units, "recorded_documents"),
        dead_letters=dict(sorted(dead_letters.items())),
        mean_entropy=_sum_float(table, "entropy_sum") / max(1, positions),
        mean_tail_mass=_sum_float(table, "tail_mass_sum") / max(1, positions),
        teacher_loss=-_sum_float(table, "next_token_logprob_sum") / max(1, positions - impossible),
        impossible_tokens=impossible,
        entropy_histogram=_sum_lists(units, "entropy_histogram"),
        tail_histogram=_sum_lists(units, "tail_histogram"),
    )


def _sum(table: Any, name: str) -> int:
    return int(pc.sum(table[name]).as_py() or 0)


def _sum_float(table: Any, name: str) -> float:
    return float(pc.sum(table[name]).as_py() or 0.0)


def _sum_lists(table: Any, name: str) -> tuple[int, ...]:
    lists = [values for values in table[name].to_pylist() if values]
    return tuple(np.sum(lists, axis=0).tolist()) if lists else ()
