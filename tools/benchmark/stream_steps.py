"""One measured step of the stream benchmark in a process of its own: `python -m tools.benchmark.stream_steps STEP`.

A JSON object on stdin says of what, one on stdout what was measured.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
from pydantic import ByteSize

from tools.benchmark.peak_memory import forget_peak, read_peak_bytes
from tools.benchmark.stream_peer import read_processor_seconds


def read(folder: str, batch: int, epochs: int, scratch_folder: str | None = None) -> list[dict[str, float]]:
    """Open a store and deliver whole epochs of it on one rank; the first begins with the opening."""
    from logitstore.store.logit_store import LogitStore
    from logitstore.stream.iterator import RecordStream
    from logitstore.stream.scratch import ScratchSettings

    started = time.perf_counter(), read_processor_seconds()
    scratch = None if scratch_folder is None else ScratchSettings(folder=scratch_folder, max_bytes=ByteSize(1 << 50))
    stream = RecordStream(LogitStore.open(folder), global_batch_sequences=batch, scratch=scratch)
    measured = []
    for _ in range(epochs):
        first_seconds, num_records, token_sum = 0.0, 0, 0
        for records in islice(stream, stream.steps_per_epoch):
            first_seconds = first_seconds or time.perf_counter() - started[0]
            token_sum += int(records.token_ids.sum(dtype=np.int64))
            num_records += len(records)
        measured.append(
            {
                "records": num_records,
                "token_sum": token_sum,
                "first_seconds": first_seconds,
                "seconds": time.perf_counter() - started[0],
                "processor_seconds": read_processor_seconds() - started[1],
                "scratch_bytes": 0 if stream.scratch_statistics is None else stream.scratch_statistics.file_bytes,
            }
        )
        started = time.perf_counter(), read_processor_seconds()
    return measured


def resume(folder: str, batch: int, start_step: int) -> float:
    """Seconds from nothing to the first batch at a step, the state's fingerprint checked."""
    from logitstore.store.logit_store import LogitStore
    from logitstore.stream.iterator import RecordStream

    stopped = RecordStream(LogitStore.open(folder), global_batch_sequences=batch, start_step=start_step)
    state = stopped.state_dict()
    stopped.close()
    started = time.perf_counter()
    stream = RecordStream(LogitStore.open(folder), global_batch_sequences=batch)
    stream.load_state_dict(state)
    next(stream)
    return time.perf_counter() - started


def order(sequences: int, records_per_row_group: int, batch: int) -> dict[str, float]:
    """Locate the first batch of an epoch of so many sequences; memory counts from the list of row groups on."""
    from logitstore.stream.order import StreamOrder

    StreamOrder(np.ones(batch, dtype=np.int64), global_batch_sequences=batch, seed=0).compute_batch(0)  # imports
    before = forget_peak()
    row_groups = np.full(sequences // records_per_row_group, records_per_row_group, dtype=np.int64)
    started = time.perf_counter()
    located = StreamOrder(row_groups, global_batch_sequences=batch, seed=0).compute_batch(0)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_bytes": read_peak_bytes() - before, "records": len(located)}


def read_all_ranks(folder: str, batch: int, world_size: int, epochs: int) -> dict[str, float]:
    """Bytes that all ranks of a job read in whole epochs, and what the row groups of the store have."""
    from logitstore.stream.iterator import RecordStream
    from tools.benchmark.stream_counting import CountingStore

    store_bytes = int(CountingStore.open(folder).manifest.read_row_groups("bytes")["bytes"].to_numpy().sum())
    read_bytes = num_records = 0
    for rank in range(world_size):
        store = CountingStore.open(folder)
        stream = RecordStream(
            store,
            global_batch_sequences=batch,
            rank=rank,
            world_size=world_size,
            read_ahead_steps=1,  # what is read ahead for the epoch after the last counts as well
        )
        for records in islice(stream, epochs * stream.steps_per_epoch):
            num_records += len(records)
        stream.close()
        assert isinstance(store, CountingStore)
        read_bytes += store.read_bytes
    return {"read_bytes": read_bytes, "store_bytes": store_bytes, "records": num_records}


def share_row_groups(row_groups: int, records_per_row_group: int, batch: int, world_size: int) -> dict[str, int]:
    """How often row groups are read in an epoch, by its order alone: once by every rank that has a record of them."""
    from logitstore.stream.order import StreamOrder

    records = _simulate_row_groups(row_groups, records_per_row_group)
    order = StreamOrder(records, global_batch_sequences=batch, seed=0)
    is_read = np.zeros((world_size, row_groups), dtype=bool)
    for step in range(order.batches_per_epoch):
        located = order.compute_batch(step)
        for rank in range(world_size):
            is_read[rank, located.slice(rank, world_size).row_groups] = True
    return {"reads": int(is_read.sum())}


def shuffle(row_groups: int, records_per_row_group: int, batch: int, sources: int) -> dict[str, float]:
    """Chi-square of the sources in the batches of an epoch, over that of batches drawn at random.

    Sources lie in the store one after the other; the first has half of it, the others share the rest.
    """
    from logitstore.stream.order import StreamOrder
    from tools.benchmark.shuffle_quality import compute_shuffle_quality

    records = _simulate_row_groups(row_groups, records_per_row_group)
    source = np.maximum(0, np.arange(row_groups) * 2 * (sources - 1) // row_groups - (sources - 2))
    order = StreamOrder(records, global_batch_sequences=batch, seed=0)
    batches = [source[order.compute_batch(step).row_groups] for step in range(order.batches_per_epoch)]
    quality = compute_shuffle_quality(batches, np.bincount(source, records).astype(np.int64))
    return {"batch": quality.batch, "run": quality.run}


def _simulate_row_groups(row_groups: int, records_per_row_group: int) -> np.ndarray:
    """Records of each; every 64th row group is shorter, as the last ones of units are."""
    records = np.full(row_groups, records_per_row_group, dtype=np.int64)
    records[63::64] -= np.random.default_rng(0).integers(0, records_per_row_group, len(records[63::64]))
    return records


STEPS: dict[str, Callable[..., Any]] = {
    step.__name__: step for step in (read, resume, order, read_all_ranks, share_row_groups, shuffle)
}


def main(step: str) -> None:
    print(json.dumps(STEPS[step](**json.load(sys.stdin))))


if __name__ == "__main__":
    main(*sys.argv[1:])
