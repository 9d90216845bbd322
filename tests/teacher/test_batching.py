from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from logitstore.teacher.batching import NUM_BATCHES_PER_WINDOW, plan_windows


@given(lengths=st.lists(st.integers(1, 50)), batch_tokens=st.integers(1, 120))
def test_windows_of_any_lengths_hold_every_sequence_once_within_the_limits(
    lengths: list[int], batch_tokens: int
) -> None:
    done = 0
    for batches in plan_windows(lengths, batch_tokens):
        indices = sorted(i for batch in batches for i in batch)
        assert indices == list(range(done, done + len(indices)))
        done += len(indices)
        assert len(indices) == 1 or sum(lengths[i] for i in indices) <= NUM_BATCHES_PER_WINDOW * batch_tokens
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= batch_tokens
    assert done == len(lengths)


def test_batches_of_mixed_lengths_join_the_similar_ones() -> None:
    (batches,) = plan_windows([10, 1, 10, 1, 1], batch_tokens=20)
    assert batches == [[0, 2], [1, 3, 4]]
