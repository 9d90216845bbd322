"""Reading a store back: what was committed, by address, by index, at a manifest."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkout import ROOT
from made_up import VOCAB_SIZE, build_records, edit_sealed

from logitstore.errors import (
    ConfigError,
    CorruptShardError,
    IncompatibleStoreError,
    OutsideError,
    StoreNotFoundError,
)
from logitstore.records import RecordAddress, RecordBatch
from logitstore.shard.layout import build_batch
from logitstore.shard.pages import Pages
from logitstore.shard.reader import _read_pages
from logitstore.store.commit import DATA
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore

BuildStore = Callable[..., LogitStore]


@pytest.fixture
def store(build_store: BuildStore, store_url: str) -> LogitStore:
    return build_store(store_url)


def test_store_read_back_holds_every_record_as_written(store: LogitStore) -> None:
    expected = [record for unit in range(3) for record in build_records(20, unit=unit, vocab_size=VOCAB_SIZE)]
    assert len(store) == len(expected) == 60
    for found, record in zip(store, expected, strict=True):
        assert found.address == record.address
        assert found.documents == record.documents
        np.testing.assert_array_equal(found.token_ids, record.token_ids)
        np.testing.assert_array_equal(found.loss_mask, record.loss_mask)
        for name in vars(record.signal):
            np.testing.assert_array_equal(getattr(found.signal, name), getattr(record.signal, name))


def test_store_index_and_address_name_the_same_record(store: LogitStore) -> None:
    for i in (0, 19, 20, 41, 59, -1):
        record = store[i]
        np.testing.assert_array_equal(store.find(record.address).token_ids, record.token_ids)
    with pytest.raises(IndexError, match="record 60 of a store of 60"):
        store[60]
    with pytest.raises(StoreNotFoundError, match="unit 1 holds 20 records"):
        store.find(RecordAddress(unit=1, index=20))


def test_store_statistics_equal_sums_over_the_records(store: LogitStore) -> None:
    records = list(store)
    statistics = store.compute_statistics()
    assert statistics.records == len(records)
    assert statistics.positions == sum(record.num_positions for record in records)
    assert statistics.taught_positions == sum(int(record.loss_mask.sum()) for record in records)
    assert statistics.support_entries == sum(len(record.signal.support_ids) for record in records)
    assert sum(statistics.entropy_histogram) == sum(statistics.tail_histogram) == statistics.positions
    entropies = np.concatenate([record.signal.entropy for record in records]).astype(np.float64)
    losses = -np.concatenate([record.signal.next_token_logprob for record in records]).astype(np.float64)
    assert statistics.mean_entropy == pytest.approx(entropies.mean(), rel=1e-12)
    assert statistics.teacher_loss == pytest.approx(losses.mean(), rel=1e-12)
    assert statistics.bytes >= sum(statistics.column_bytes.values()) > 0


def test_store_of_two_sources_reports_each(build_store: BuildStore) -> None:
    store = build_store(num_units=4, sources=("books", "code"))
    assert store.list_sources() == ["books", "code"]
    parts = [store.compute_statistics(source).records for source in store.list_sources()]
    assert parts == [40, 40]


def test_store_pickled_opens_the_same_manifest(store: LogitStore) -> None:
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.manifest_number, copy.fingerprint) == (store.manifest_number, store.fingerprint)


def test_live_snapshot_refuses_to_be_pickled(store: LogitStore) -> None:
    with pytest.raises(ConfigError, match="a live snapshot cannot be pickled"):
        pickle.dumps(LogitStore.open(store.url, "live"))


def test_store_keeps_no_python_object_per_row_group(store: LogitStore) -> None:
    held = [value for value in vars(store).values() if isinstance(value, list | dict | tuple)]
    assert max(map(len, held)) < store.num_row_groups


def test_read_that_fails_is_tried_again_after_each_wait(store: LogitStore, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    failures = 3
    read = StoreFiles.read

    def fail_at_first(self: StoreFiles, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        nonlocal failures
        if failures:
            failures -= 1
            raise OutsideError("connection reset")
        return read(self, path, start, stop)

    monkeypatch.setattr(StoreFiles, "read", fail_at_first)
    monkeypatch.setattr("logitstore.store.logit_store.time.sleep", waited.append)
    patient = LogitStore(store._files, store.plan, store.manifest, retry_waits_seconds=(1, 2, 3))
    np.testing.assert_array_equal(patient[0].token_ids, build_records(20, vocab_size=VOCAB_SIZE)[0].token_ids)
    assert waited == [1, 2, 3]
    failures = 4
    with pytest.raises(OutsideError, match="connection reset"):
        patient.read_row_group(0)
    assert waited == [1, 2, 3] * 2


def test_open_without_store_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match=r"expected a store, found no plan.json.*logitstore capture"):
        LogitStore.open(str(tmp_path / "nowhere"))


def test_open_of_a_manifest_that_is_not_there_lists_those_that_are(build_store: BuildStore) -> None:
    store = build_store()
    with pytest.raises(StoreNotFoundError, match=r"expected manifest 7, found manifests \[1\]"):
        LogitStore.open(store.url, manifest=7)


def test_open_of_a_newer_format_is_refused_with_both_versions(build_store: BuildStore) -> None:
    plan = Path(build_store().url) / "plan.json"
    edit_sealed(plan, '"format_version": 1', '"format_version": 9')
    with pytest.raises(IncompatibleStoreError, match="in the store: 9\n  this program reads: 1"):
        LogitStore.open(str(plan.parent))


@pytest.mark.parametrize("part", ["first byte", "pages", "footer"])
def test_reader_with_flipped_byte_names_the_file_and_part(build_store: BuildStore, part: str) -> None:
    store = build_store(num_units=1)
    [path] = Path(store.url).glob("data/*.parquet")
    data = bytearray(path.read_bytes())
    footer = store.manifest.file.read()["footer_offset"][0].as_py()
    place = {"first byte": 4, "pages": footer // 2, "footer": footer + 9}[part]
    data[place] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(CorruptShardError, match=rf"{path.name}: (row group|footer).*(.|\n)*logitstore verify"):
        list(LogitStore.open(store.url))


@pytest.mark.parametrize("damage", ["truncated", "gone", "emptied"])
def test_reader_of_a_damaged_file_raises_and_never_ends_early(
    build_store: BuildStore, store_url: str, damage: str
) -> None:
    store = build_store(store_url, num_units=2)
    files = StoreFiles(store.url)
    name = files.list(DATA)[1].name
    if damage == "gone":
        files.delete(f"{DATA}/{name}")
    else:
        files.put(f"{DATA}/{name}", files.read(f"{DATA}/{name}")[: 0 if damage == "emptied" else -100])
    with pytest.raises(CorruptShardError, match=name):
        list(LogitStore.open(store.url))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them")
def test_reading_a_store_leaves_no_native_thread_behind(small_store_url: str) -> None:
    """A thread that lets go of Python's bytes while the interpreter shuts down ends the process (SIGABRT)."""
    code = (
        "import os, sys\n"
        "from logitstore import LogitStore\n"
        "import pyarrow.parquet, pyarrow.compute\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "store = LogitStore.open(sys.argv[1])\n"
        "assert len(list(store)) == len(store) and store.compute_statistics().positions\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, small_store_url], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "0\n", "")


def test_store_decompresses_in_several_threads_and_computes_in_one(
    store: LogitStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    four_are_in, is_held = threading.Barrier(4, timeout=60), []

    def read_pages(*arguments: Any) -> dict[str, Pages]:
        four_are_in.wait()
        return _read_pages(*arguments)

    def compute(*arguments: Any) -> RecordBatch:
        is_held.append(store._computing.locked())
        return build_batch(*arguments)

    monkeypatch.setattr("logitstore.shard.reader._read_pages", read_pages)
    monkeypatch.setattr("logitstore.shard.reader.build_batch", compute)
    threads = [threading.Thread(target=store.read_row_group, args=(0,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert is_held == [True] * 4
    assert not store._computing.locked()
