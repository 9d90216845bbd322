"""What a finished shard says of itself in its commit: digests, offsets and statistics of every row group."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field, StringConstraints

from logitstore.records import RecordBatch
from logitstore.settings import Settings

# Bins of the histograms kept per row group: entropy in half nats up to 16, tail mass in decades from 1 down to 1e-8.
ENTROPY_BIN_NATS = 0.5
ENTROPY_BINS = 32
TAIL_DECADES = 8
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class RowGroup(Settings):
    """One row group: where its bytes are, and sums over its positions (all positions, taught or not)."""

    offset: int
    bytes: int
    sha256: Sha256
    records: int
    positions: int
    taught_positions: int
    support_entries: int
    entropy_sum: float
    """nats; unknown entropies, NaN, are left out here and in the histogram"""
    next_token_logprob_sum: float
    """nats; left out are unknown ones, NaN, and those that are -inf, which `impossible_tokens` counts"""
    impossible_tokens: int
    tail_mass_sum: float
    entropy_histogram: tuple[int, ...] = Field(min_length=ENTROPY_BINS, max_length=ENTROPY_BINS)
    """positions with entropy in [i/2, (i+1)/2) nats; the last bin is open"""
    column_bytes: dict[str, int]
    """compressed bytes of each column, page headers included"""
    tail_histogram: tuple[int, ...] = Field(min_length=TAIL_DECADES + 1, max_length=TAIL_DECADES + 1)
    """positions with tail mass in (10^-(i+1), 10^-i]; the last bin holds everything below, zero included"""


class ShardSummary(Settings):
    """One shard file, whole."""

    bytes: int
    sha256: Sha256
    footer_offset: int
    footer_sha256: Sha256
    row_groups: tuple[RowGroup, ...] = Field(min_length=1)

    @property
    def records(self) -> int:
        return sum(row_group.records for row_group in self.row_groups)

    @property
    def positions(self) -> int:
        return sum(row_group.positions for row_group in self.row_groups)


def compute_row_group_statistics(batch: RecordBatch) -> dict[str, object]:
    """The fields of `RowGroup` that depend on the values and not on the bytes."""
    next_token = batch.next_token_logprob.astype(np.float64)
    possible = np.isfinite(next_token)
    entropy = batch.entropy[~np.isnan(batch.entropy)]
    entropy_bins = np.clip(entropy / ENTROPY_BIN_NATS, 0, ENTROPY_BINS - 1).astype(np.int64)
    decades = np.clip(-batch.tail_logprob / np.log(10), 0, TAIL_DECADES).astype(np.int64)
    return {
        "records": len(batch),
        "positions": batch.num_positions,
        "taught_positions": int(batch.loss_mask.sum()),
        "support_entries": len(batch.support_ids),
        "entropy_sum": float(entropy.sum(dtype=np.float64)),
        "next_token_logprob_sum": float(next_token[possible].sum()),
        "impossible_tokens": int((next_token == -np.inf).sum()),
        "tail_mass_sum": float(np.exp(batch.tail_logprob.astype(np.float64)).sum()),
        "entropy_histogram": tuple(np.bincount(entropy_bins, minlength=ENTROPY_BINS).tolist()),
        "tail_histogram": tuple(np.bincount(decades, minlength=TAIL_DECADES + 1).tolist()),
    }
