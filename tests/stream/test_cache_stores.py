"""Stores that read through a cache."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from logitstore.errors import ConfigError, CorruptShardError
from logitstore.store.aligned_stores import AlignedStores
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.stream.cache import RowGroupCache

BuildStore = Callable[..., LogitStore]


def test_store_with_a_cache_reads_everything_once_and_pickles_with_it(
    build_store: BuildStore, cache: RowGroupCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = build_store()
    store = LogitStore.open(plain.url, cache=RowGroupCache(cache.folder, 1 << 20))
    for _ in range(2):
        for row_group in range(plain.num_row_groups):
            expected = plain.read_row_group(row_group)
            np.testing.assert_array_equal(store.read_row_group(row_group).support_ids, expected.support_ids)
    again = pickle.loads(pickle.dumps(store))
    assert (again.cache.folder, again.cache.max_bytes) == (cache.folder, 1 << 20)

    read = StoreFiles.read

    def refuse_data(self: StoreFiles, path: str, *arguments: int | None) -> bytes:
        assert not path.startswith("data/")
        return read(self, path, *arguments)

    monkeypatch.setattr(StoreFiles, "read", refuse_data)
    assert [record.address for record in again] == [record.address for record in store]
    assert again.cache.statistics.hits == plain.num_row_groups + 3  # and a footer of each unit


def test_stores_read_together_share_a_cache_and_pickle_with_it(build_store: BuildStore, cache: RowGroupCache) -> None:
    url = build_store(num_units=1).url
    shared = RowGroupCache(cache.folder, 1 << 20)
    stores = AlignedStores([LogitStore.open(url, cache=shared), LogitStore.open(url, cache=shared)])
    again = pickle.loads(pickle.dumps(stores))
    assert again.stores[0].cache is again.stores[1].cache  # one of both stores, as before
    num_reads = stores.num_row_groups + 1  # and a footer
    for row_group in range(stores.num_row_groups):
        stores.read_row_group(row_group)
        again.read_row_group(row_group)
    assert (shared.statistics.misses, shared.statistics.hits) == (num_reads, num_reads)
    assert (again.stores[0].cache.statistics.misses, again.stores[0].cache.statistics.hits) == (0, 2 * num_reads)


def test_store_damaged_behind_the_cache_is_found_out_on_the_way_in(build_store: BuildStore, tmp_path: Path) -> None:
    store = build_store(num_units=1)
    path = next(Path(store.url).glob("data/*"))
    data = bytearray(path.read_bytes())
    data[8] ^= 1
    path.write_bytes(data)
    cache = RowGroupCache(tmp_path / "cache", 1 << 20)
    with pytest.raises(CorruptShardError, match="row group 0"):
        LogitStore.open(store.url, cache=cache).read_row_group(0)
    assert not list(cache.folder.glob("*.cached"))


def test_cache_smaller_than_a_row_group_is_refused_with_both_sizes(build_store: BuildStore, tmp_path: Path) -> None:
    store = build_store()
    largest = int(store.row_group_bytes.max())
    with pytest.raises(ConfigError, match=rf"max_bytes of at least {largest}.*{store.url}, found {largest - 1};"):
        LogitStore.open(store.url, cache=RowGroupCache(tmp_path / "cache", largest - 1))
    held = LogitStore.open(store.url, cache=RowGroupCache(tmp_path / "cache", largest))
    assert len(list(held)) == len(store)
