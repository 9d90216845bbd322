"""Stores and data sets for the tests of conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from logitstore.records import Record


def read_rows(folder: str | Path) -> list[dict[str, Any]]:
    """All rows of a data set, in the order of its files."""
    rows: list[dict[str, Any]] = []
    for path in sorted(Path(folder, "data").glob("*.parquet")):
        rows.extend(pq.read_table(path).to_pylist())
    return rows


def list_supports(record: Record, top_k: int) -> list[dict[int, float]]:
    """Id to logprob of the `top_k` likeliest entries at every position of a record."""
    supports = []
    for position in range(record.num_positions):
        ids, logprobs = record.signal.support_at(position)
        supports.append({int(i): float(v) for i, v in zip(ids[:top_k], logprobs[:top_k], strict=True)})
    return supports


def renormalize(support: dict[int, float]) -> dict[int, float]:
    """Logprobs over the entries of a support alone."""
    total = np.logaddexp.reduce(list(support.values()))
    return {token_id: value - total for token_id, value in support.items()}
