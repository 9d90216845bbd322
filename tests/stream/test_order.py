"""The order of the stream against its specification."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.errors import ConfigError
from logitstore.stream.order import Batch, StreamOrder

row_groups = st.lists(st.integers(1, 12), min_size=1, max_size=30)


def places(batch: Batch) -> list[tuple[int, int]]:
    return list(zip(batch.row_groups.tolist(), batch.records.tolist(), strict=True))


@settings(max_examples=150, deadline=None)
@given(row_groups, st.integers(1, 24), st.integers(0, 9), st.integers(1, 8), st.integers(1, 3), st.integers(0, 2))
def test_epoch_holds_every_record_exactly_once(
    counts: list[int], batch_size: int, seed: int, lanes: int, window: int, epoch: int
) -> None:
    batch_size = min(batch_size, sum(counts))
    order = StreamOrder(
        np.array(counts), global_batch_sequences=batch_size, seed=seed, lanes=lanes, window_row_groups=window
    )
    seen = [p for b in range(order.batches_per_epoch + 1) for p in places(order.compute_epoch_batch(epoch, b))]
    assert sorted(seen) == [(g, r) for g, count in enumerate(counts) for r in range(count)]


@settings(max_examples=60, deadline=None)
@given(row_groups, st.integers(0, 3))
def test_last_step_of_a_row_group_is_never_before_its_last_use(counts: list[int], seed: int) -> None:
    size = min(4, sum(counts))
    order = StreamOrder(np.array(counts), global_batch_sequences=size, seed=seed, lanes=4)
    for step in range(2 * order.batches_per_epoch):
        for row_group in order.compute_batch(step).row_groups.tolist():
            assert order.find_last_step(step, row_group) >= step


def test_batches_of_all_world_sizes_are_the_same_records() -> None:
    order = StreamOrder(np.full(20, 7), global_batch_sequences=12, seed=3)
    for step in range(30):
        whole = order.compute_batch(step)
        for world_size in (1, 2, 3, 4, 6, 12):
            parts = [places(whole.slice(rank, world_size)) for rank in range(world_size)]
            assert {len(part) for part in parts} == {12 // world_size}
            assert list(chain.from_iterable(parts)) == places(whole)


def test_order_is_a_function_of_the_step_alone() -> None:
    steps = [17, 3, 58, 3, 0, 41]
    fresh = [places(StreamOrder(np.full(9, 11), global_batch_sequences=8, seed=1).compute_batch(s)) for s in steps]
    used = StreamOrder(np.full(9, 11), global_batch_sequences=8, seed=1)
    assert [places(used.compute_batch(step)) for step in steps] == fresh


def test_full_batches_take_equally_many_records_of_every_lane() -> None:
    order = StreamOrder(np.full(64, 10), global_batch_sequences=32, seed=0, lanes=16)
    lane_of = {}
    epoch = order._open_epoch(0)
    for place, row_group in enumerate(epoch._dealt.tolist()):
        lane_of[row_group] = place % order.num_lanes
    for batch in range(order.batches_per_epoch):
        lanes = [lane_of[g] for g in order.compute_epoch_batch(0, batch).row_groups.tolist()]
        assert lanes == sorted(lanes)
        assert np.bincount(lanes, minlength=16).tolist() == [2] * 16


def test_rank_that_owns_whole_lanes_reads_no_row_group_of_another() -> None:
    order = StreamOrder(np.full(64, 10), global_batch_sequences=32, seed=0, lanes=16)
    read = [set(), set(), set(), set()]  # type: list[set[int]]
    for step in range(order.batches_per_epoch):
        for rank in range(4):
            read[rank].update(order.compute_batch(step).slice(rank, 4).row_groups.tolist())
    assert sum(map(len, read)) == len(set.union(*read)) == 64


def test_epochs_and_seeds_differ() -> None:
    order = StreamOrder(np.full(9, 11), global_batch_sequences=9, seed=1)
    other = StreamOrder(np.full(9, 11), global_batch_sequences=9, seed=2)
    first = places(order.compute_epoch_batch(0, 0))
    assert first != places(order.compute_epoch_batch(1, 0))
    assert first != places(other.compute_epoch_batch(0, 0))


def test_order_is_the_one_that_was_published() -> None:
    """Golden values: a change of these breaks every checkpoint ever written."""
    order = StreamOrder(np.array([5, 3, 4, 6]), global_batch_sequences=4, seed=42, lanes=2, window_row_groups=2)
    assert [places(order.compute_batch(step)) for step in (0, 5)] == GOLDEN


def test_order_of_a_hundred_million_records_stays_small() -> None:
    order = StreamOrder(np.full(1_000_000, 100), global_batch_sequences=512, seed=0)
    assert len(order.compute_batch(order.batches_per_epoch // 2)) == 512
    assert order.num_lanes == 256


@pytest.mark.parametrize("changes", [{"global_batch_sequences": 41}, {"seed": -1}, {"lanes": 0}])
def test_order_with_impossible_numbers_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="stream: "):
        StreamOrder(np.full(4, 10), **{"global_batch_sequences": 4, "seed": 0, **changes})


GOLDEN = [[(0, 4), (0, 2), (1, 0), (1, 1)], [(1, 0), (2, 1), (0, 4), (0, 1)]]
