"""The parts of the stream benchmark, on records few and small enough for a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitstore.records import Record, RecordBatch
from logitstore.shard.codec import Float32Codec
from logitstore.shard.invariants import find_violations
from logitstore.shard.layout import FORMAT_VERSION, ShardHeader
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from tools.benchmark import stream_peer
from tools.benchmark.stream_processes import Figure, copy_linked, measure_bytes, run_step
from tools.benchmark.stream_records import ARRAYS, read_arrays, vary_records, write_arrays, write_store
from tools.benchmark.stream_storage import copied_store, measure_storage
from tools.benchmark.stream_throughput import HEADER, SCRATCH_NAME, STORE_NAME, Reader, measure_throughput
from tools.benchmark.synthetic_teacher import build_synthetic_records

VOCAB_SIZE, TOP_K, NUM_RECORDS, BATCH = 2000, 8, 24, 4


@pytest.fixture(scope="module")
def base() -> list[Record]:
    return list(build_synthetic_records(2, TOP_K, vocab_size=VOCAB_SIZE))


@pytest.fixture(scope="module")
def arrays(base: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream") / "arrays"
    write_arrays(folder, vary_records(base, NUM_RECORDS, vocab_size=VOCAB_SIZE), NUM_RECORDS)
    return folder


@pytest.fixture(scope="module")
def store(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream") / "store"
    write_store(StoreFiles(str(folder)), arrays, VOCAB_SIZE, {"row_group_bytes": 300_000})
    return folder


def test_varied_records_are_true_signals_and_all_different(base: list[Record]) -> None:
    varied = list(vary_records(base, 6, vocab_size=VOCAB_SIZE))
    codec = Float32Codec()
    header = ShardHeader(
        format_version=FORMAT_VERSION, unit=0, plan_fingerprint="0" * 64, vocab_size=VOCAB_SIZE, codec=codec
    )
    batch = RecordBatch.from_records(varied)
    assert list(find_violations(batch, header)) == []
    assert batch.indices.tolist() == [0, 1, 2, 3, 4, 5]
    assert len({record.signal.support_ids.tobytes() for record in varied}) == 6
    assert len({record.signal.support_logprobs.tobytes() for record in varied}) == 6


def test_varied_records_take_the_bytes_of_true_ones(base: list[Record], tmp_path: Path) -> None:
    sizes = []
    for name, records in (("true", base), ("varied", list(vary_records(base, 4, vocab_size=VOCAB_SIZE))[2:])):
        write_arrays(tmp_path / name, iter(records), len(records))
        write_store(StoreFiles(str(tmp_path / f"{name}-store")), tmp_path / name, VOCAB_SIZE)
        sizes.append(measure_bytes(tmp_path / f"{name}-store" / "data"))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.03)


def test_store_and_arrays_hold_the_same_records(arrays: Path, store: Path) -> None:
    opened = LogitStore.open(str(store))
    assert len(opened) == NUM_RECORDS
    for stored, plain in zip(opened, read_arrays(arrays), strict=True):
        assert stored.address == plain.address
        assert (stored.token_ids == plain.token_ids).all()
        assert np.sort(stored.signal.support_ids).tolist() == np.sort(plain.signal.support_ids).tolist()
        np.testing.assert_allclose(stored.signal.support_logprobs, plain.signal.support_logprobs, atol=0.2)


def test_peers_are_given_what_the_store_holds_in_narrow_types(arrays: Path) -> None:
    assert set(stream_peer.COLUMNS) == set(ARRAYS)
    records = list(stream_peer._read_records(str(arrays)))
    assert len(records) == NUM_RECORDS
    assert {name: values.dtype for name, values in records[0].items()} == {
        name: np.int32 if np.issubdtype(dtype, np.integer) else np.float16 for name, dtype in ARRAYS.items()
    }


def test_epoch_of_a_peer_counts_records_and_ids_in_either_form(arrays: Path) -> None:
    tokens = np.load(arrays / "token_ids.npy")
    for is_joined in (True, False):
        found = stream_peer.read_epoch(stream_peer._read_records(str(arrays)), BATCH, is_joined, (0.0, 0.0))
        assert found["records"] == NUM_RECORDS
        assert found["token_sum"] == tokens.sum()
        assert 0 < found["first_seconds"] < found["seconds"]


def test_batches_of_a_peer_are_flat_columns_in_the_types_of_ours(arrays: Path, store: Path) -> None:
    joined = stream_peer._join(list(stream_peer._read_records(str(arrays)))[:BATCH])
    ours = RecordBatch.from_records([LogitStore.open(str(store))[i] for i in range(BATCH)])
    for name, values in joined.items():
        assert (values.dtype, values.shape) == (getattr(ours, name).dtype, getattr(ours, name).shape)


def test_processor_seconds_count_children_that_still_run() -> None:
    code = "while sum(__import__('os').times()[:2]) < 0.3: pass\nprint(flush=True)\ninput()"
    before = stream_peer.read_processor_seconds()
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    running = stream_peer.read_processor_seconds() - before
    child.communicate(b"\n")
    assert running >= 0.25
    assert stream_peer.read_processor_seconds() - before >= running - 0.02


def test_script_for_peers_runs_without_this_project(tmp_path: Path) -> None:
    script = Path(stream_peer.__file__)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = (
        f"import runpy, sys; runpy.run_path({str(script)!r}); assert not {{'logitstore', 'tools'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


@pytest.mark.slow
def test_readings_of_our_stream_make_a_row_of_numbers(arrays: Path, store: Path, tmp_path: Path) -> None:
    pytest.importorskip("xxhash")
    readers = measure_throughput(tmp_path, arrays, {STORE_NAME: store}, batch=BATCH, repeats=2, peers_python=None)
    assert [reader.name for reader in readers] == [STORE_NAME, SCRATCH_NAME]
    plain, scratched = readers
    for reader in readers:
        row = reader.build_row(NUM_RECORDS)
        assert len(row) == 1 + len(HEADER)
        assert [len(run) for run in reader.epochs] == [3, 3]
        assert all(float(cell.partition(" ±")[0].replace(",", "")) > 0 for cell in row[1:])
    assert plain.bytes_after == measure_bytes(store)
    assert scratched.bytes_after > 2 * measure_bytes(store)


@pytest.mark.slow
def test_every_rank_count_reads_the_store_about_once(store: Path) -> None:
    one, four = (
        run_step("read_all_ranks", folder=str(store), batch=BATCH, world_size=world_size, epochs=2)
        for world_size in (1, 4)
    )
    assert one["store_bytes"] == four["store_bytes"] > 0
    assert one["records"] == four["records"] == 2 * NUM_RECORDS
    for found in (one, four):  # what stays in memory from one epoch to the next is not read again
        assert found["store_bytes"] <= found["read_bytes"] <= 4 * found["store_bytes"]


def test_row_groups_are_shared_by_ranks_only_where_lanes_run_out() -> None:
    found = run_step("share_row_groups", row_groups=400, records_per_row_group=16, batch=64, world_size=8)
    assert 400 <= found["reads"] < 1.5 * 400  # of 8 · 400 that all ranks could read


def test_shuffle_of_a_simulated_store_is_near_that_of_a_random_draw() -> None:
    found = run_step("shuffle", row_groups=1000, records_per_row_group=16, batch=64, sources=4)
    assert 0.5 < found["batch"] < 1.5
    assert found["run"] > 0


def test_order_of_many_sequences_is_measured_in_a_process_of_its_own() -> None:
    found = run_step("order", sequences=10_000, records_per_row_group=10, batch=64)
    assert found["records"] == 64
    assert 0 < found["seconds"] < 60
    assert found["peak_bytes"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "s3"])
def test_stream_and_download_are_timed_on_a_copy_that_is_deleted(
    request: pytest.FixtureRequest, store: Path, tmp_path: Path, kind: str
) -> None:
    url: str = request.getfixturevalue("s3_url") if kind == "s3" else str(tmp_path / "copy")
    with copied_store(str(store), url) as copy:
        assert len(LogitStore.open(copy)) == NUM_RECORDS
        rates = measure_storage(copy, batch=BATCH, threads=2, repeats=1)
    assert set(rates) == {"stream", "download"}
    assert all(rate.median > 0 for rate in rates.values())
    assert StoreFiles(url).list("data") == StoreFiles(url).list("commits") == []


def test_reader_that_delivers_other_records_is_refused(store: Path, tmp_path: Path) -> None:
    def read(folder: Path) -> list[dict[str, Any]]:
        return [{"records": 23, "token_sum": 5, "first_seconds": 1.0, "seconds": 1.0, "processor_seconds": 1.0}]

    with pytest.raises(OSError, match="expected 24 records with ids of 5 in all, found 23"):
        Reader(name="short", folder=store, read=read).repeat(tmp_path / "fresh", 24, 5)


def test_linked_copy_keeps_the_original_when_it_is_changed(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "shard").write_bytes(b"abc")
    copy = copy_linked(tmp_path / "source", tmp_path / "copy")
    (copy / "raw").write_bytes(b"abcdef")
    (copy / "shard").unlink()
    assert measure_bytes(copy) == 6
    assert measure_bytes(tmp_path / "source") == 3


def test_figure_says_median_and_half_the_spread() -> None:
    assert Figure(values=(900.0, 1000.0, 1080.0)).format() == "1,000 ±9%"
    assert json.loads(json.dumps(Figure(values=(0.5, 0.4, 0.6)).format(2))) == "0.50 ±20%"
