"""Storage that lies, breaks and hangs under a stream: what comes is the clean order, all of it or its beginning."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_proxy import Fault, FaultProxy, Rule

from logitstore import storage_clients
from logitstore.errors import CorruptShardError, OutsideError
from logitstore.records import RecordBatch
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.stream.cache import RowGroupCache
from logitstore.stream.iterator import RecordStream

BuildStore = Callable[..., LogitStore]
# 3 units of 20 records in about 9 row groups; 60 records are 15 steps.
BATCH, STEPS = 4, 15
QUICK = {"read_timeout": 0.5, "connect_timeout": 0.5, "retries": {"total_max_attempts": 1}}


def describe(batch: RecordBatch) -> tuple[object, str]:
    """The addresses of a batch, and a digest of everything in it."""
    digest = hashlib.sha256()
    for field in fields(batch):
        value = getattr(batch, field.name)
        digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return batch.addresses(), digest.hexdigest()


def take(stream: RecordStream, steps: int) -> list[tuple[object, str]]:
    return [describe(next(stream)) for _ in range(steps)]


def open_stream(store: LogitStore, *, threads: int = 2) -> RecordStream:
    return RecordStream(store, global_batch_sequences=BATCH, threads=threads)


def take_until_it_fails(stream: RecordStream, error: type[Exception], match: str) -> list[tuple[object, str]]:
    delivered: list[tuple[object, str]] = []
    with pytest.raises(error, match=match):
        delivered.extend(map(describe, islice(stream, STEPS)))
    return delivered


def resume(stream: RecordStream, delivered: list[tuple[object, str]], error: type[Exception]) -> None:
    """Take what is missing of two epochs; reads that were asked for before may have failed as well, once each."""
    while len(delivered) < 2 * STEPS:
        with contextlib.suppress(error):
            delivered.append(describe(next(stream)))


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, build_store: BuildStore) -> LogitStore:
    """A small store on disk, and on the S3 server."""
    return build_store(request.getfixturevalue("s3_url") if request.param == "s3" else None)


@pytest.fixture
def clean(store: LogitStore) -> list[tuple[object, str]]:
    """What a stream over the undamaged store delivers in two epochs."""
    stream = open_stream(store)
    batches = take(stream, 2 * STEPS)
    stream.close()
    return batches


def find_first_step(store: LogitStore, is_damaged: Callable[[int], bool]) -> int:
    """The first step that needs one of some row groups, by the order alone."""
    order = open_stream(store).order
    return next(step for step in range(STEPS) if any(map(is_damaged, order.compute_batch(step).row_groups.tolist())))


def build_other_parquet(num_bytes: int) -> bytes:
    """A sound Parquet file that is no shard, made as long as it has to be."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["x" * num_bytes]}), buffer, compression="none", use_dictionary=False)
    return buffer.getvalue()


DAMAGES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "truncated": lambda data, _: data[: len(data) // 2],
    "empty": lambda *_: b"",
    "other shard in its place, same size": lambda data, other: (other * 2)[: len(data)],
    "object of another schema in its place": lambda data, _: build_other_parquet(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_stream_over_a_damaged_file_delivers_the_steps_before_it_then_names_it(
    store: LogitStore, clean: list[tuple[object, str]], damage: str
) -> None:
    files, path = StoreFiles(store.url), store._get_path(0)
    data = files.read(path)
    files.put(path, DAMAGES[damage](data, files.read(store._get_path(store.num_row_groups - 1))))
    stream = open_stream(LogitStore.open(store.url))
    error = rf"{path}: (row group \d+|footer): (?s:.)*run 'logitstore verify {store.url}' and capture unit 0 again"
    delivered = take_until_it_fails(stream, CorruptShardError, error)
    # Of the truncated one, the first row groups are whole, but the footer is not.
    assert delivered == clean[: find_first_step(store, lambda row_group: store.row_group_units[row_group] == 0)]
    files.put(path, data)  # from a copy of the store, say
    resume(stream, delivered, CorruptShardError)
    assert delivered == clean


def test_stream_over_a_flipped_bit_reads_its_row_group_twice_and_raises_at_its_first_step(
    store: LogitStore, clean: list[tuple[object, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = store.num_row_groups // 2
    files, path, place = StoreFiles(store.url), store._get_path(damaged), int(store._offsets[damaged])
    data = bytearray(files.read(path))
    data[place + int(store.row_group_bytes[damaged]) // 2] ^= 1
    files.put(path, bytes(data))
    reads: list[tuple[str, int | None]] = []
    note_reads(monkeypatch, reads)
    stream = open_stream(LogitStore.open(store.url))
    delivered = take_until_it_fails(stream, CorruptShardError, "the bytes are not the ones that were committed")
    assert delivered == clean[: find_first_step(store, lambda row_group: row_group == damaged)]
    assert reads.count((path, place)) == 2


def note_reads(monkeypatch: pytest.MonkeyPatch, reads: list[tuple[str, int | None]]) -> None:
    read = StoreFiles.read

    def note(self: StoreFiles, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        reads.append((path, start))
        return read(self, path, start, stop)

    monkeypatch.setattr(StoreFiles, "read", note)


@pytest.mark.parametrize("is_cached", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize("damage", ["bit", "short", "empty", "other"])
def test_every_part_damaged_on_its_first_reading_is_read_again_and_all_is_delivered(
    build_store: BuildStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, is_cached: bool
) -> None:
    store = build_store()
    clean = take(open_stream(store), STEPS)
    damaged: set[tuple[str, int | None]] = set()
    read, lock = StoreFiles.read, threading.Lock()

    def damage_first(self: StoreFiles, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        data = read(self, path, start, stop)
        with lock:
            if start is None or (path, start) in damaged:
                return data
            damaged.add((path, start))
        flipped = data[:-1] + bytes([data[-1] ^ 1])
        return {"bit": flipped, "short": data[:-1], "empty": b"", "other": os.urandom(len(data))}[damage]

    monkeypatch.setattr(StoreFiles, "read", damage_first)
    cache = RowGroupCache(tmp_path / "cache", 1 << 20) if is_cached else None
    assert take(open_stream(LogitStore.open(store.url, cache=cache)), STEPS) == clean
    assert len(damaged) == store.num_row_groups + 3  # and the footer of each unit


def open_behind(store: LogitStore, proxy: FaultProxy, *, is_quick: bool = False) -> LogitStore:
    options = {"endpoint_url": proxy.endpoint_url, "config_kwargs": QUICK if is_quick else {}}
    return LogitStore.open(store.url, storage_options=options, retry_waits_seconds=(0.0,))


def data_of(store: LogitStore) -> str:
    """What requests for the shards have in their path: threads of an earlier test may still ask for those of theirs."""
    return f"{store.url.rsplit('/', 1)[-1]}/data/"


@pytest.fixture
def s3_store(s3_url: str, build_store: BuildStore) -> LogitStore:
    return build_store(s3_url)


# Fault, first request that it happens to, and to how many.
WEATHER: dict[str, tuple[Fault, int, int]] = {
    "503 bursts": ("refuse", 2, 8),
    "resets": ("reset", 2, 8),
    "resets in the middle of a body": ("reset_body", 2, 3),
    "bodies cut short": ("truncate", 2, 3),
    "bodies that stall": ("stall", 3, 1),
    "requests that hang": ("hang", 3, 1),
}


@pytest.mark.parametrize("weather", WEATHER)
def test_stream_in_bad_weather_delivers_every_step(s3_store: LogitStore, proxy: FaultProxy, weather: str) -> None:
    clean = take(open_stream(s3_store), STEPS)
    fault, skip, times = WEATHER[weather]
    stream = open_stream(open_behind(s3_store, proxy, is_quick=fault in ("stall", "hang")))
    rule = Rule(fault=fault, path=data_of(s3_store), skip=skip, times=times)
    proxy.set(rule)
    assert take(stream, STEPS) == clean
    assert rule.hits == times


def test_stream_over_a_wire_that_flips_bits_delivers_every_step(s3_store: LogitStore, proxy: FaultProxy) -> None:
    clean = take(open_stream(s3_store), STEPS)
    rules = [Rule(fault="corrupt", path=data_of(s3_store), times=1, skip=skip) for skip in (0, 2, 4, 6)]
    stream = open_stream(open_behind(s3_store, proxy), threads=1)
    proxy.set(*rules)
    assert take(stream, STEPS) == clean
    assert [rule.hits for rule in rules] == [1] * 4


@pytest.mark.slow
def test_stream_whose_body_comes_byte_by_byte_gives_it_up_and_reads_it_again(
    s3_store: LogitStore, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = take(open_stream(s3_store), STEPS)
    monkeypatch.setattr(storage_clients, "_READ_SECONDS", 2.0)
    rule = Rule(fault="drip", path=data_of(s3_store), times=1)
    stream = open_stream(open_behind(s3_store, proxy))
    proxy.set(rule)
    assert take(stream, STEPS) == clean
    assert rule.hits == 1
    proxy.set(Rule(fault="drip", path=data_of(s3_store)))
    behind = open_behind(s3_store, proxy)
    behind._retry_waits_seconds = ()
    with pytest.raises(OutsideError, match=r"data/.*bytes did not come within 2 s.*run the command again"):
        behind.read_row_group(0)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["refuse", "hang"])
def test_stream_whose_server_is_away_says_so_and_goes_on_when_it_is_back(
    s3_store: LogitStore, proxy: FaultProxy, fault: Fault
) -> None:
    clean = take(open_stream(s3_store), 2 * STEPS)
    behind = open_behind(s3_store, proxy, is_quick=True)
    behind._retry_waits_seconds = ()
    stream = open_stream(behind, threads=1)
    proxy.set(Rule(fault=fault, path=data_of(s3_store), times=4))  # s3fs's two rounds of two, for one read
    assert take_until_it_fails(stream, OutsideError, rf"{s3_store.url}/data/.*run the command again") == []
    delivered: list[tuple[object, str]] = []
    resume(stream, delivered, OutsideError)
    assert delivered == clean


def test_stream_whose_object_is_replaced_underneath_delivers_no_record_of_the_new_one(
    store: LogitStore, clean: list[tuple[object, str]], build_store: BuildStore, tmp_path: Path
) -> None:
    other = build_store(str(tmp_path / "other"), seed=1)  # same plan, other records
    files, paths = StoreFiles(store.url), [store._get_path(row_group) for row_group in range(store.num_row_groups)]
    stream = RecordStream(LogitStore.open(store.url), global_batch_sequences=BATCH, read_ahead_steps=1, threads=1)
    delivered = take(stream, 3)
    for path, replaced in zip(sorted(set(paths)), StoreFiles(other.url).list("data"), strict=True):
        files.put(path, StoreFiles(other.url).read(f"data/{replaced.name}"))
    delivered += take_until_it_fails(stream, CorruptShardError, "data/")
    assert delivered == clean[: len(delivered)]
    assert stream.step == len(delivered)


def test_stream_from_a_cache_asks_the_server_for_what_was_poisoned_only(
    s3_store: LogitStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    clean = take(open_stream(s3_store), 2 * STEPS)
    cache = RowGroupCache(tmp_path / "cache", 1 << 20)
    behind = LogitStore.open(s3_store.url, storage_options={"endpoint_url": proxy.endpoint_url}, cache=cache)
    for row_group in range(behind.num_row_groups):
        behind.read_row_group(row_group)
    poisoned = sorted(cache.folder.glob("*.cached"))[::2]
    for entry in poisoned:
        entry.write_bytes(entry.read_bytes()[::-1])
    proxy.set()
    assert take(open_stream(pickle.loads(pickle.dumps(behind))), 2 * STEPS) == clean
    assert proxy.count("GET", data_of(s3_store)) == len(poisoned) > 3


def measure(folder: Path) -> int:
    """Bytes of the entries that are there, but for those that go meanwhile."""
    total = 0
    for path in folder.glob("*.cached"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_two_jobs_share_a_cache_smaller_than_their_store_and_both_get_every_step(
    build_store: BuildStore, tmp_path: Path
) -> None:
    store = build_store()
    clean = take(open_stream(store), 3 * STEPS)
    max_bytes = int(store.row_group_bytes.sum()) // 3
    jobs = []
    for _ in range(2):
        cache = RowGroupCache(tmp_path / "cache", max_bytes)
        jobs.append((open_stream(LogitStore.open(store.url, cache=cache)), cache))
    for step in range(3 * STEPS):
        for stream, cache in jobs:
            assert describe(next(stream)) == clean[step]
            assert measure(cache.folder) <= max_bytes
    assert all(cache.statistics.misses and not cache.statistics.healed for _, cache in jobs)


def test_two_jobs_side_by_side_fetch_every_row_group_once(build_store: BuildStore, tmp_path: Path) -> None:
    store = build_store()
    clean = take(open_stream(store), STEPS)
    caches = [RowGroupCache(tmp_path / "cache", 1 << 20) for _ in range(2)]
    streams = [open_stream(LogitStore.open(store.url, cache=cache)) for cache in caches]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda stream: take(stream, STEPS), streams)) == [clean, clean]
    assert sum(cache.statistics.misses for cache in caches) == store.num_row_groups + 3  # and the footers
