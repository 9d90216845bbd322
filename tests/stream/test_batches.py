"""Parts of record batches: some of the records, and the first slots of their supports."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from made_up import build_records
from made_up_draws import build_drawn_records

from logitstore.errors import ConfigError, ShapeError
from logitstore.records import Record, RecordBatch
from logitstore.store.aligned_records import AlignedBatch, align_batches
from logitstore.stream.batch_memory import BatchMemory
from logitstore.stream.batches import first_slots, join_records, take_records

VOCAB_SIZE = 50


def build_unequal_records(num_records: int = 7, seed: int = 3, **options: object) -> list[Record]:
    """Of unequal lengths, with supports of unequal widths and two documents in every other one."""
    records = build_records(num_records, length=9, top_k=6, seed=seed, **options)
    return [replace(record, documents=record.documents * (1 + i % 2)) for i, record in enumerate(records)]


def check_batches_are_equal(found: RecordBatch, expected: RecordBatch) -> None:
    assert type(found) is type(expected)
    for field in fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "further":
            for batch, other_batch in zip(one, other, strict=True):
                check_batches_are_equal(batch, other_batch)
        elif isinstance(other, np.ndarray):
            np.testing.assert_array_equal(one, other, err_msg=field.name)
            assert one.dtype == other.dtype, field.name
        else:
            assert one == other, field.name


@pytest.mark.parametrize("places", [[0, 1, 2, 3, 4, 5, 6], [6, 0, 3], [2], [5, 5, 1], []])
@pytest.mark.parametrize("temperatures", [(), (1.5, 4.0)])
def test_records_that_are_taken_are_those_joined_one_by_one(places: list[int], temperatures: tuple[float, ...]) -> None:
    records = build_unequal_records(temperatures=temperatures)
    taken = take_records(RecordBatch.from_records(records), np.array(places, dtype=np.int64))
    if places:
        check_batches_are_equal(taken, RecordBatch.from_records([records[place] for place in places]))
    assert len(taken) == len(places)


def test_records_that_are_taken_bring_their_draws() -> None:
    records = build_drawn_records(5, "head_tail", length=9, seed=3)
    taken = take_records(RecordBatch.from_records(records), np.array([4, 1]))
    check_batches_are_equal(taken, RecordBatch.from_records([records[4], records[1]]))


def test_records_that_are_taken_are_of_the_sources_that_they_were_of() -> None:
    records = RecordBatch.from_records(build_unequal_records())
    batch = replace(records, stream_sources=np.array([0, 1, 1, 0, 2, 0, 1]))
    for part in (take_records(batch, np.array([4, 1, 0])), first_slots(batch.slice(0, 5), 2)):
        assert part.stream_sources is not None
        found = dict(zip(part.indices.tolist(), part.stream_sources.tolist(), strict=True))
        assert found == {place: [0, 1, 1, 0, 2, 0, 1][place] for place in found}
    assert take_records(records, np.array([4])).stream_sources is None


def build_aligned_batch() -> AlignedBatch:
    first = RecordBatch.from_records(build_unequal_records())
    return align_batches(first, [replace(first, support_logprobs=first.support_logprobs - 0.5)])


def test_records_that_are_taken_bring_the_signals_of_every_store() -> None:
    batch = build_aligned_batch()
    taken = take_records(batch, np.array([6, 2]))
    assert isinstance(taken, AlignedBatch)
    check_batches_are_equal(taken, AlignedBatch.from_records([batch.record(6), batch.record(2)]))


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_first_slots_are_what_a_capture_of_fewer_slots_keeps(k: int) -> None:
    """The same distributions, sparsified with the smaller k at once; tails to the rounding of their parts."""
    wide, narrow = (
        RecordBatch.from_records(build_records(5, length=9, top_k=slots, ragged=False, seed=3, temperatures=(2.0,)))
        for slots in (6, k)
    )
    found = first_slots(wide, k)
    for field in fields(RecordBatch):
        if field.name != "tail_logprob" and isinstance(getattr(narrow, field.name), np.ndarray):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(narrow, field.name), err_msg=field.name)
    np.testing.assert_allclose(found.tail_logprob, narrow.tail_logprob, rtol=2e-6)
    assert found.tail_logprob.dtype == np.float32
    assert (found.tail_logprob > wide.tail_logprob).all()


def test_first_slots_leave_positions_of_fewer_alone() -> None:
    batch = RecordBatch.from_records(build_unequal_records())
    cut, is_narrow = first_slots(batch, 3), batch.support_counts <= 3
    assert is_narrow.any()
    np.testing.assert_array_equal(cut.tail_logprob == batch.tail_logprob, is_narrow)
    for one, other in zip(cut, batch, strict=True):
        for position in range(other.num_positions):
            for found, expected in zip(one.signal.support_at(position), other.signal.support_at(position), strict=True):
                np.testing.assert_array_equal(found, expected[:3])


def test_first_slots_leave_the_mass_of_every_position_as_it_was() -> None:
    batch = RecordBatch.from_records(build_unequal_records())
    for k in (1, 3):
        masses = []
        for part in (batch, first_slots(batch, k)):
            of_entries = np.exp(part.support_logprobs.astype(np.float64))
            position = np.repeat(np.arange(part.num_positions), part.support_counts)
            inside = np.bincount(position, weights=of_entries, minlength=part.num_positions)
            masses.append(inside + np.exp(part.tail_logprob.astype(np.float64)))
        np.testing.assert_allclose(masses[1], masses[0], rtol=1e-6)


def test_first_slots_of_a_support_without_tail_have_the_dropped_mass_for_one() -> None:
    whole = RecordBatch.from_records(build_records(3, length=9, top_k=VOCAB_SIZE, ragged=False, seed=3))
    assert (whole.tail_logprob == -np.inf).all()
    cut = first_slots(whole, 4)
    inside = np.exp(cut.support_logprobs.astype(np.float64))
    position = np.repeat(np.arange(cut.num_positions), cut.support_counts)
    kept = np.bincount(position, weights=inside, minlength=cut.num_positions)
    np.testing.assert_allclose(np.exp(cut.tail_logprob), 1 - kept, rtol=1e-5)


def test_first_slots_of_supports_that_have_no_more_are_the_batch() -> None:
    batch = RecordBatch.from_records(build_unequal_records())
    assert first_slots(batch, 6) is batch


def test_first_slots_cut_the_supports_of_every_store() -> None:
    batch = build_aligned_batch()
    cut = first_slots(batch, 2)
    check_batches_are_equal(cut.further[0], first_slots(batch.further[0], 2))
    assert cut.support_counts.max() == cut.further[0].support_counts.max() == 2


@pytest.mark.parametrize("kind", ["sample", "head_tail"])
def test_first_slots_of_drawn_supports_are_refused(kind: str) -> None:
    batch = RecordBatch.from_records(build_drawn_records(3, kind, length=9, seed=3))
    with pytest.raises(ConfigError, match="found drawn ones"):
        first_slots(batch, 2)


def test_no_slots_are_refused() -> None:
    with pytest.raises(ShapeError, match="at least 1 slot, found 0"):
        first_slots(RecordBatch.from_records(build_unequal_records()), 0)


@pytest.mark.parametrize("kind", ["ragged", "even", "drawn", "tempered", "aligned", "without documents", "no entries"])
def test_records_that_are_joined_are_those_joined_one_by_one(kind: str) -> None:
    batches = [build_batch(kind, seed) for seed in range(3)]
    parts = [(batches[number], place) for number, place in ((2, 0), (0, 3), (0, 3), (1, 6), (2, 5))]
    expected = type(batches[0]).from_records([batch.record(place) for batch, place in parts])
    check_batches_are_equal(join_records(parts, BatchMemory()), expected)


def build_batch(kind: str, seed: int) -> RecordBatch:
    if kind == "drawn":
        return RecordBatch.from_records(build_drawn_records(7, "head_tail", length=9, seed=seed))
    options = {"temperatures": (1.5, 4.0)} if kind == "tempered" else {"ragged": kind != "even"}
    batch = RecordBatch.from_records(build_unequal_records(seed=seed, **options))
    if kind == "aligned":
        return align_batches(batch, [replace(batch, tail_logprob=batch.tail_logprob - 1)])
    if kind == "without documents":
        return replace(batch, documents=None)
    return first_slots(batch, 1) if kind == "no entries" else batch


def test_records_that_are_joined_are_of_the_sources_that_they_were_of() -> None:
    batches = [replace(build_batch("ragged", seed), stream_sources=np.full(7, seed)) for seed in range(2)]
    joined = join_records([(batches[1], 2), (batches[0], 0), (batches[1], 4)], BatchMemory())
    assert joined.stream_sources is not None
    assert joined.stream_sources.tolist() == [1, 0, 1]
