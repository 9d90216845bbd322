"""Threads that read ahead: what goes wrong in them reaches the loop, and nothing of them outlives the stream."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from logitstore.errors import ConfigError, OutsideError
from logitstore.records import RecordBatch
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.stream.iterator import RecordStream
from logitstore.stream.order import StreamOrder
from logitstore.stream.read_ahead import ReadAhead
from logitstore.stream.read_plan import ReadPlan
from logitstore.stream.source_reader import SourceReader
from tests.stream_processes import WATCHDOG_SECONDS, list_addresses, take_addresses, wait_until

Read = Callable[..., RecordBatch]


class NobodyExpectsError(BaseException):
    """Not an Exception, as what interpreters and test runners raise to end a thread."""


@pytest.fixture
def store(build_store: Callable[..., LogitStore]) -> LogitStore:
    return build_store(num_units=4, records_per_unit=17)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    for thread in list_threads():
        thread.join(10.0)
        assert not thread.is_alive()


def list_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("logitstore-stream")]


def take_until(stream: RecordStream, error: type[BaseException]) -> list[list[str]]:
    """The batches before an error, which has to come within two epochs."""
    delivered: list[list[str]] = []
    with pytest.raises(error):
        delivered.extend(map(list_addresses, islice(stream, 2 * stream.steps_per_epoch)))
    return delivered


@pytest.mark.parametrize("error", [MemoryError, NobodyExpectsError, KeyboardInterrupt, SystemExit, KeyError])
def test_error_of_a_reading_thread_is_raised_at_the_step_that_needs_the_data(
    store: LogitStore, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    clean = take_addresses(RecordStream(store, global_batch_sequences=4), 17)
    order = StreamOrder(store.row_group_records, global_batch_sequences=4, seed=0)
    bad = int(order.compute_batch(9).row_groups[0])
    first_step = next(step for step in range(17) if bad in order.compute_batch(step).row_groups)
    with monkeypatch.context() as broken:
        broken.setattr(LogitStore, "read_packed_row_group", fail_at(bad, error))
        stream = RecordStream(store, global_batch_sequences=4)
        delivered = take_until(stream, error)
        assert delivered == clean[:first_step]
        assert take_until(stream, error) == []  # asked for again, and failed again
    assert delivered + take_addresses(stream, 17 - first_step) == clean
    stream.close()


def fail_at(bad: int, error: type[BaseException]) -> Read:
    read = LogitStore.read_packed_row_group

    def read_or_fail(self: LogitStore, row_group: int, **options: Any) -> RecordBatch:
        if row_group == bad:
            raise error("of a thread")
        return read(self, row_group, **options)

    return read_or_fail


@pytest.mark.parametrize(("method", "steps"), [("join", 64), ("compute_batch", 64), ("compute_batch", 0)])
def test_error_of_the_joining_thread_is_raised_and_passes(
    store: LogitStore, monkeypatch: pytest.MonkeyPatch, method: str, steps: int
) -> None:
    clean = take_addresses(RecordStream(store, global_batch_sequences=4), 17)
    owner: Any = SourceReader if method == "join" else StreamOrder
    whole, calls = getattr(owner, method), iter(range(100))

    def fail_at_the_fifth(*arguments: Any) -> Any:
        if next(calls) == 4:
            raise MemoryError("of the joining thread")
        return whole(*arguments)

    monkeypatch.setattr(owner, method, fail_at_the_fifth)
    stream = RecordStream(store, global_batch_sequences=4, read_ahead_steps=steps)
    delivered = take_until(stream, MemoryError)
    assert delivered + take_addresses(stream, 17 - len(delivered)) == clean
    stream.close()


def test_reads_that_failed_while_a_storage_was_away_are_made_again_before_anyone_needs_them() -> None:
    order = StreamOrder(np.full(12, 4), global_batch_sequences=4, seed=0, lanes=1, window_row_groups=1)
    plan = ReadPlan(order, rank=0, world_size=1, step=0, skip=(), steps_ahead=8, row_groups_ahead=5)
    is_away = threading.Event()
    is_away.set()

    def read(row_group: int) -> Any:
        if is_away.is_set():
            raise OutsideError("storage is away")
        return row_group

    ahead = ReadAhead(plan, read=read, join=Mock(return_value="batch"), threads=1)
    with pytest.raises(OutsideError):
        ahead.take()
    # The first was raised, the joining thread asks for no more, and the others have failed too.
    found = ahead._work._row_groups
    wait_until(lambda: len(found) == 5 and None not in found.values())
    is_away.clear()
    assert [ahead.take()[0] for _ in range(12)] == list(range(12))
    ahead.close()


def test_interrupt_between_a_batch_and_its_delivery_loses_no_step(store: LogitStore) -> None:
    clean = take_addresses(RecordStream(store, global_batch_sequences=4), 17)
    stream = RecordStream(store, global_batch_sequences=4)
    delivered = take_addresses(stream, 3)
    assert stream._ahead is not None
    stream._ahead.take()  # as if a signal had come right behind it
    assert delivered + take_addresses(stream, 14) == clean
    stream.close()


def test_stream_that_was_not_asked_has_no_threads(store: LogitStore) -> None:
    stream = RecordStream(store, global_batch_sequences=4)
    stream.state_dict()
    assert list_threads() == []


def test_stream_reads_ahead_while_the_caller_works(store: LogitStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read, read_all = LogitStore.read_packed_row_group, threading.Event()
    seen: set[int] = set()

    def note(self: LogitStore, row_group: int, **options: Any) -> RecordBatch:
        seen.add(row_group)
        if len(seen) == self.num_row_groups:
            read_all.set()
        return read(self, row_group, **options)

    monkeypatch.setattr(LogitStore, "read_packed_row_group", note)
    stream = RecordStream(store, global_batch_sequences=4, read_ahead_row_groups=store.num_row_groups)
    next(stream)
    assert read_all.wait(WATCHDOG_SECONDS)  # without another call
    stream.close()


@pytest.fixture
def hanging_store(store: LogitStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[LogitStore]:
    """A store of which the fifth read and all later ones hang until the test is over."""
    calls, end, read = iter(range(10_000)), threading.Event(), StoreFiles.read

    def read_or_hang(*arguments: Any) -> bytes:
        if next(calls) >= 4:
            end.wait()
        return read(*arguments)

    opened = LogitStore.open(store.url)
    monkeypatch.setattr(StoreFiles, "read", read_or_hang)
    yield opened
    end.set()


def test_close_while_a_read_hangs_returns_and_at_once(hanging_store: LogitStore) -> None:
    stream = RecordStream(hanging_store, global_batch_sequences=1, lanes=1, threads=1)
    next(stream)
    stream.close()
    with pytest.raises(ConfigError, match="was closed"):
        next(stream)


def test_close_from_another_thread_ends_a_next_that_waits(hanging_store: LogitStore) -> None:
    stream = RecordStream(hanging_store, global_batch_sequences=1, lanes=1, threads=1)
    raised: list[type[BaseException]] = []

    def take_all() -> None:
        try:
            while True:
                next(stream)
        except ConfigError as error:
            raised.append(type(error))

    taker = threading.Thread(target=take_all, daemon=True)
    taker.start()
    stream.close()
    taker.join(WATCHDOG_SECONDS)
    assert raised == [ConfigError]


def test_dropped_stream_is_collected_at_once_and_ends_its_threads(store: LogitStore) -> None:
    gc.disable()
    try:
        stream = RecordStream(store, global_batch_sequences=4)
        take_addresses(stream, 3)
        work = weakref.ref(stream._ahead._work if stream._ahead is not None else stream)
        threads, dropped = list_threads(), weakref.ref(stream)
        assert len(threads) == 5
        del stream
        assert dropped() is None
        for thread in threads:
            thread.join(WATCHDOG_SECONDS)
        assert [thread for thread in threads if thread.is_alive()] == []
        del threads, thread
        assert work() is None
    finally:
        gc.enable()


def test_stream_that_raised_leaves_no_cycle(store: LogitStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LogitStore, "read_packed_row_group", fail_at(int(store.num_row_groups) - 1, OSError))
    gc.collect()
    gc.disable()
    try:
        stream = RecordStream(store, global_batch_sequences=4)
        with contextlib.suppress(OSError):
            take_addresses(stream, 17)
        assert stream.step < 17
        dropped = weakref.ref(stream)
        del stream
        assert dropped() is None
    finally:
        gc.enable()


def test_state_loaded_while_threads_read_begins_anew(store: LogitStore) -> None:
    clean = take_addresses(RecordStream(store, global_batch_sequences=4), 30)
    stream = RecordStream(store, global_batch_sequences=4)
    for step in (9, 0, 25, 25, 3):
        stream.load_state_dict(stream.state_dict(step))
        assert take_addresses(stream, 4) == clean[step : step + 4]
    stream.close()


@pytest.mark.parametrize("options", [{"threads": 0}, {"read_ahead_steps": -1}, {"read_ahead_row_groups": -1}])
def test_stream_that_could_never_read_is_refused(store: LogitStore, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected a thread or more"):
        RecordStream(store, global_batch_sequences=4, **options)  # type: ignore[arg-type]
