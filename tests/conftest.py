"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up import VOCAB_SIZE, build_plan, build_records, put_shard

from logitstore.records import Record
from logitstore.store.commit import Outcome, build_attempt, commit_unit
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import write_manifest
from logitstore.store.plan import create_plan


@pytest.fixture
def make_records() -> Callable[..., list[Record]]:
    return build_records


@pytest.fixture
def build_store(tmp_path: Path) -> Callable[..., LogitStore]:
    """Function that fills a store with made-up records and opens it."""

    def build(
        url: str | None = None,
        *,
        num_units: int = 3,
        records_per_unit: int = 20,
        sources: tuple[str, ...] = ("corpus",),
        **record_options: Any,
    ) -> LogitStore:
        files = StoreFiles(url or str(tmp_path / "store"))
        plan = create_plan(files, build_plan(num_units, sources=sources))
        for unit in range(num_units):
            records = build_records(records_per_unit, unit=unit, vocab_size=VOCAB_SIZE, **record_options)
            assert commit_unit(files, put_shard(files, plan, unit, records, build_attempt(), tmp_path)) is Outcome.WON
        write_manifest(files, plan.compute_fingerprint())
        return LogitStore.open(files.url)

    return build


@pytest.fixture
def small_store_url(build_store: Callable[..., LogitStore]) -> str:
    """URL of a small store on disk."""
    return build_store().url
