"""Stores and data sets for the tests of conversion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from made_up import VOCAB_SIZE, build_records

from logitstore.interchange.exporting import Export, ExportSettings
from logitstore.interchange.import_plan import ForeignTeacher, ImportSettings, build_import_plan
from logitstore.interchange.importing import DataSetImport
from logitstore.records import Record
from logitstore.settings import build_settings
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import write_manifest
from logitstore.store.plan import create_plan

TEACHER = ForeignTeacher(
    model="big", tokenizer="big", tokenizer_fingerprint="1" * 64, vocab_size=VOCAB_SIZE, end_of_text_id=0
)
FLOAT32 = {"codec": {"kind": "float32"}}


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


def ignore(done: int, total: int) -> None:
    pass


def plan_import(folder: Path | str, store: Path | str, **settings: Any) -> DataSetImport:
    plan = build_import_plan(str(folder), TEACHER, build_settings(ImportSettings, settings, where="test"))
    files = StoreFiles(str(store))
    return DataSetImport(files, replace(plan, store=create_plan(files, plan.store)))


def import_all(data_set: DataSetImport, store: Path | str) -> LogitStore:
    for unit in range(len(data_set.plan.store.build_unit_table())):
        data_set.import_unit(unit)
    write_manifest(StoreFiles(str(store)), data_set.plan.store.compute_fingerprint())
    return LogitStore.open(str(store))


def export_store(store: LogitStore, folder: Path | str, **settings: Any) -> Export:
    export = Export(store, StoreFiles(str(folder)), build_settings(ExportSettings, settings, where="test"))
    export.write(ignore)
    return export


def write_rows(path: Path, rows: list[dict[str, Any]], row_group_size: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)


def build_distillkit_rows(count: int, **changes: Any) -> list[dict[str, Any]]:
    """Rows whose entries hold the token that comes next at every position."""
    rows = []
    for record in build_records(count, ragged=False, vocab_size=VOCAB_SIZE):
        supports = list_supports(record, 8)
        for support, next_id in zip(supports, record.token_ids[1:].tolist(), strict=True):
            if next_id not in support:
                support.popitem()
                support[next_id] = -9.0
        rows.append(
            {
                "input_ids": record.token_ids.tolist(),
                "token_ids": [list(support) for support in supports],
                "top_values": [list(support.values()) for support in supports],
                **changes,
            }
        )
    return rows
