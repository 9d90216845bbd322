"""Streams whose supports are decoded when their batch is joined: the batches of streams that decode at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitstore.records import RecordBatch
from logitstore.shard import compiled
from logitstore.shard.codec import CompactCodec
from logitstore.shard.packed import PackedRowGroup
from logitstore.store.logit_store import LogitStore
from logitstore.stream.iterator import RecordStream
from logitstore.stream.source import StreamSource
from tests.stream.test_batches import check_batches_are_equal


@pytest.fixture
def even_stores(build_store: Callable[..., LogitStore], tmp_path: Path) -> list[LogitStore]:
    """A store of 8 entries at each position, one of 5, and a ragged one; all of the codec compact."""
    options: list[dict[str, Any]] = [{"ragged": False}, {"ragged": False, "top_k": 5}, {"ragged": True}]
    stores = [
        build_store(
            str(tmp_path / f"store{seed}"), num_units=2, records_per_unit=11, seed=seed, codec=CompactCodec(), **of
        )
        for seed, of in enumerate(options)
    ]
    assert all(isinstance(store.plan.shard.codec, CompactCodec) for store in stores)
    return stores


@pytest.mark.parametrize("loops", ["numpy", "compiled"])
@pytest.mark.parametrize("kind", ["one", "mixture", "subset", "documents"])
def test_batches_of_packed_row_groups_are_those_of_decoded_ones(
    even_stores: list[LogitStore], monkeypatch: pytest.MonkeyPatch, kind: str, loops: str
) -> None:
    if loops == "compiled":
        pytest.importorskip("numba")
    monkeypatch.setattr(compiled, "PATIENCE_ENTRIES", 0 if loops == "compiled" else 1 << 60)
    first = even_stores[0]
    sources = {
        "one": [StreamSource(first)],
        "mixture": [StreamSource(store, name=str(number)) for number, store in enumerate(even_stores)],
        "subset": [StreamSource(first, subset=np.arange(0, first.num_row_groups, 2))],
        "documents": [StreamSource(first)],
    }[kind]
    stream = RecordStream(sources, global_batch_sequences=4, seed=3, with_documents=kind == "documents")
    assert [type(stream._reader.read_packed(0)), type(stream._reader.read(0))] == [PackedRowGroup, RecordBatch]
    for step in range(2 * stream.steps_per_epoch):
        places = stream.order.compute_batch(step)
        expected = [
            stream._reader.read(row_group).record(place)
            for row_group, place in zip(places.row_groups.tolist(), places.records.tolist(), strict=True)
        ]
        found = replace(next(stream), stream_sources=None)
        check_batches_are_equal(found, RecordBatch.from_records(expected))
    stream.close()


def test_batch_that_is_held_stays_what_it_was_while_others_come(
    even_stores: list[LogitStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitstore.stream.batch_memory._LEAST_BYTES", 0)
    stream = RecordStream(even_stores[0], global_batch_sequences=4, seed=3)
    held = next(stream)
    ids, logprobs = held.support_ids.copy(), held.support_logprobs.copy()
    addresses = {find_address(held)}
    for _ in range(30):
        addresses.add(find_address(next(stream)))
    stream.close()
    np.testing.assert_array_equal(held.support_ids, ids)
    np.testing.assert_array_equal(held.support_logprobs, logprobs)
    assert len(addresses) < 10  # memory of batches that nobody holds is used again


def find_address(batch: RecordBatch) -> int:
    return int(batch.support_ids.__array_interface__["data"][0])
