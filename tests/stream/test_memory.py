"""What a stream holds: as much as it says, in the third epoch as in the first."""

from __future__ import annotations

import gc
import threading
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from logitstore.records import RecordBatch
from logitstore.store.logit_store import LogitStore
from logitstore.stream.iterator import RecordStream
from logitstore.stream.source import StreamSource

BuildStore = Callable[..., LogitStore]
THREADS, LANES, WINDOW = 2, 2, 2


@pytest.fixture
def store(build_store: BuildStore) -> LogitStore:
    return build_store(num_units=6, records_per_unit=40)


@pytest.mark.parametrize("row_groups_ahead", [0, 3])
def test_stream_holds_no_more_row_groups_than_it_says_in_any_of_three_epochs(
    store: LogitStore, monkeypatch: pytest.MonkeyPatch, row_groups_ahead: int
) -> None:
    alive: weakref.WeakSet[RecordBatch] = weakref.WeakSet()
    most, read = [0], LogitStore.read_packed_row_group

    def note(self: LogitStore, row_group: int, **options: Any) -> RecordBatch:
        batch = read(self, row_group, **options)
        alive.add(batch)
        most[0] = max(most[0], len(alive))
        return batch

    monkeypatch.setattr(LogitStore, "read_packed_row_group", note)
    stream = RecordStream(
        store,
        global_batch_sequences=2,
        lanes=LANES,
        window_row_groups=WINDOW,
        read_ahead_row_groups=row_groups_ahead,
        threads=THREADS,
    )
    assert store.num_row_groups > 3 * (WINDOW * LANES + row_groups_ahead)
    for _ in range(3 * stream.steps_per_epoch):
        next(stream)
    # Open ones, those that begin within a step, those ahead, and each thread's own.
    assert WINDOW * LANES <= most[0] <= WINDOW * LANES + 2 + row_groups_ahead + THREADS
    stream.close()
    for thread in threading.enumerate():
        if thread.name.startswith("logitstore-stream"):
            thread.join()
    assert not alive


@pytest.mark.slow
@pytest.mark.parametrize("is_mixture", [False, True])
def test_memory_of_a_stream_is_flat_over_nine_epochs(store: LogitStore, is_mixture: bool) -> None:
    sources = [StreamSource(store, name="one"), StreamSource(store, name="two", weight=0.5)]
    stream = RecordStream(
        sources if is_mixture else store, global_batch_sequences=8, lanes=LANES, read_ahead_row_groups=2, threads=1
    )
    epoch_bytes = sum(len(store.read_row_group_bytes(row_group)) for row_group in range(store.num_row_groups))
    sizes = []
    tracemalloc.start()
    try:
        for _ in range(10):
            for _ in range(stream.steps_per_epoch):
                next(stream)
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes())
    finally:
        tracemalloc.stop()
    stream.close()
    # The first epoch fills what is kept of footers and orders. What is open when an epoch ends differs from one to the
    # next (threads read ahead as they get to it), so the least of three is held to the least of three: a stream that
    # kept what it read would have grown by at least six epochs' bytes in between.
    assert min(sizes[-3:]) - min(sizes[1:4]) < epoch_bytes
