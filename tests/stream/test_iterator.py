"""The stream: the store's records, at every world size, from every step, and never fewer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest

from logitstore.errors import ConfigError, CorruptShardError, IncompatibleStoreError, OutsideError
from logitstore.records import RecordAddress
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.stream.iterator import RecordStream
from logitstore.stream.selection import HeldOut, split_row_groups
from logitstore.stream.source import StreamSource

BuildStore = Callable[..., LogitStore]


@pytest.fixture
def store(build_store: BuildStore) -> LogitStore:
    return build_store(num_units=4, records_per_unit=17, sources=("books", "code"))


def join(parts: Iterable[list[RecordAddress]]) -> list[RecordAddress]:
    return list(chain.from_iterable(parts))


def take(stream: RecordStream, steps: int) -> list[list[RecordAddress]]:
    return [next(stream).addresses() for _ in range(steps)]


def test_stream_of_one_epoch_delivers_every_record_once(store: LogitStore) -> None:
    stream = RecordStream(store, global_batch_sequences=4)
    assert stream.steps_per_epoch == 17
    seen = join(take(stream, 17))
    assert sorted(seen) == sorted(record.address for record in store)
    assert sorted(join(take(stream, 17))) == sorted(seen)


def test_stream_record_carries_the_signal_of_its_address(store: LogitStore) -> None:
    for batch in (next(RecordStream(store, global_batch_sequences=8, start_step=s)) for s in (0, 5)):
        for record in batch:
            np.testing.assert_array_equal(record.token_ids, store.find(record.address).token_ids)
            np.testing.assert_array_equal(
                record.signal.support_logprobs, store.find(record.address).signal.support_logprobs
            )


def test_stream_restored_at_every_step_delivers_the_rest(store: LogitStore) -> None:
    whole = take(RecordStream(store, global_batch_sequences=4), 40)
    for stop in range(0, 40, 3):
        first = RecordStream(store, global_batch_sequences=4)
        take(first, stop)
        restored = RecordStream(store, global_batch_sequences=4)
        restored.load_state_dict(first.state_dict())
        assert take(restored, 40 - stop) == whole[stop:]


def test_stream_restored_twice_and_while_reading_ahead_delivers_the_rest(store: LogitStore) -> None:
    stream = RecordStream(store, global_batch_sequences=4)
    state = stream.state_dict()
    whole = take(stream, 25)
    for _ in range(2):
        stream.load_state_dict(state)
        assert take(stream, 25) == whole


@pytest.mark.parametrize("changes_at", [(7, 2), (20, 4)])
def test_stream_with_another_world_size_midway_has_the_same_global_batches(
    store: LogitStore, changes_at: tuple[int, int]
) -> None:
    whole = take(RecordStream(store, global_batch_sequences=4), 30)
    step, world_size = changes_at
    ranks = [
        RecordStream(store, global_batch_sequences=4, rank=rank, world_size=world_size, start_step=step)
        for rank in range(world_size)
    ]
    joined = [join(next(rank).addresses() for rank in ranks) for _ in range(30 - step)]
    assert joined == whole[step:]


def test_stream_reads_every_row_group_once_an_epoch(store: LogitStore, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = LogitStore.read_packed_row_group

    def count(self: LogitStore, row_group: int, *, with_documents: bool = False) -> object:
        reads.append(row_group)
        return read(self, row_group, with_documents=with_documents)

    monkeypatch.setattr(LogitStore, "read_packed_row_group", count)
    # One thread reads in the order asked for; the epoch's last row group is asked for before the next epoch's first.
    stream = RecordStream(store, global_batch_sequences=4, read_ahead_row_groups=0, threads=1)
    take(stream, stream.steps_per_epoch)
    assert sorted(reads[: store.num_row_groups]) == list(range(store.num_row_groups))


def test_stream_over_damaged_bytes_raises_at_the_step_that_needs_them(store: LogitStore) -> None:
    clean = take(RecordStream(store, global_batch_sequences=4), 17)
    path = sorted(Path(store.url).glob("data/*.parquet"))[2]
    data = bytearray(path.read_bytes())
    data[8] ^= 1
    path.write_bytes(data)
    stream = RecordStream(LogitStore.open(store.url), global_batch_sequences=4)
    delivered = []
    with pytest.raises(CorruptShardError, match=path.name):
        delivered.extend(batch.addresses() for batch in islice(stream, 17))
    assert delivered == clean[: len(delivered)]


def test_stream_whose_storage_was_away_goes_on_where_it_stopped(
    store: LogitStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = take(RecordStream(store, global_batch_sequences=4), 17)
    stream = RecordStream(LogitStore.open(store.url, retry_waits_seconds=()), global_batch_sequences=4)
    delivered = take(stream, 3)
    stream.load_state_dict(stream.state_dict())  # nothing is left of what was read ahead
    with monkeypatch.context() as away:
        away.setattr(StoreFiles, "read", raise_outside_error)
        for _ in range(2):
            with pytest.raises(OutsideError, match="away"):
                next(stream)
    for _ in range(17 + store.num_row_groups):  # reads that were asked for meanwhile may have failed: once each
        try:
            delivered.extend(take(stream, 1) if len(delivered) < 17 else [])
        except OutsideError:
            continue
    assert delivered == whole


def raise_outside_error(*_: object, **__: object) -> bytes:
    raise OutsideError("storage is away")


def test_stream_state_of_other_settings_is_refused_with_both_sides(store: LogitStore) -> None:
    state = RecordStream(store, global_batch_sequences=4).state_dict()
    with pytest.raises(IncompatibleStoreError, match=f"in the state:    {state['fingerprint']}"):
        RecordStream(store, global_batch_sequences=4, seed=1).load_state_dict(state)


def test_stream_of_ranks_that_do_not_divide_the_batch_is_refused(store: LogitStore) -> None:
    with pytest.raises(ConfigError, match="3 ranks cannot share a global batch of 4"):
        RecordStream(store, global_batch_sequences=4, rank=0, world_size=3)


def test_stream_of_a_step_below_0_is_refused(store: LogitStore) -> None:
    with pytest.raises(ConfigError, match="expected a step of 0 or more, found -1"):
        RecordStream(store, global_batch_sequences=4, start_step=-1)
    stream = RecordStream(store, global_batch_sequences=4)
    with pytest.raises(ConfigError, match="expected a step of 0 or more, found -2"):
        stream.load_state_dict(stream.state_dict(-2))


@pytest.mark.parametrize("name", [None, "store"])
def test_state_of_a_stream_of_numpy_s_integers_is_the_same_and_plain(store: LogitStore, name: str | None) -> None:
    numbers = {"global_batch_sequences": 4, "seed": 3, "lanes": 2, "window_row_groups": 2, "start_step": 5}
    states = [
        json.dumps(RecordStream([StreamSource(store, name=name)], **options).state_dict())
        for options in (numbers, {key: np.int64(number) for key, number in numbers.items()})
    ]
    assert states[0] == states[1]


def test_held_out_source_is_never_streamed(store: LogitStore) -> None:
    train, held_out = split_row_groups(store, HeldOut(source="code"))
    stream = RecordStream(store, global_batch_sequences=2, row_groups=train)
    units = {address.unit for batch in take(stream, stream.steps_per_epoch) for address in batch}
    assert units == {0, 1}
    assert {int(u) for g in held_out for u in store.read_row_group(int(g)).units} == {2, 3}


def test_held_out_fraction_takes_the_same_row_groups_every_time(store: LogitStore) -> None:
    train, held_out = split_row_groups(store, HeldOut(fraction=0.25))
    again = split_row_groups(LogitStore.open(store.url), HeldOut(fraction=0.25))
    assert len(held_out) == round(0.25 * store.num_row_groups)
    assert sorted([*train, *held_out]) == list(range(store.num_row_groups))
    np.testing.assert_array_equal(held_out, again[1])


def test_held_out_source_that_is_not_there_lists_the_sources(store: LogitStore) -> None:
    with pytest.raises(ConfigError, match=r"its sources are \['books', 'code'\]"):
        split_row_groups(store, HeldOut(source="poems"))
