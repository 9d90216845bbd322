"""What becomes of a data set's logprobs: checks, order, scale and tail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitstore.interchange.rows import PADDING_LOGPROB, ForeignRow, ForeignSequence, RejectedRowError, split_row
from logitstore.interchange.signals import SignalRules, build_signal
from logitstore.records import Record, RecordAddress, RecordBatch
from logitstore.shard.codec import Float32Codec
from logitstore.shard.invariants import find_violations
from logitstore.shard.layout import FORMAT_VERSION, ShardHeader

RULES = SignalRules(vocab_size=10, top_k=3, normalization="vocabulary", mass_tolerance=0.01)


def build_sequence(*supports: dict[int, float], tokens: list[int] | None = None) -> ForeignSequence:
    """A sequence from the probabilities of its entries."""
    return ForeignSequence(
        token_ids=np.array(tokens or [1] * (len(supports) + 1)),
        loss_mask=np.ones(len(supports), dtype=bool),
        counts=np.array([len(support) for support in supports]),
        ids=np.array([token_id for support in supports for token_id in support], dtype=np.int64),
        logprobs=np.log([p for support in supports for p in support.values()]).astype(np.float32),
    )


def build_rules(**changes: Any) -> SignalRules:
    return SignalRules(**{**vars(RULES), **changes})


def test_signal_over_the_vocabulary_leaves_the_rest_to_the_tail() -> None:
    signal = build_signal(build_sequence({4: 0.25, 7: 0.5}, {2: 1.0}, tokens=[0, 4, 9]), RULES)
    assert signal.support_counts.tolist() == [2, 1]
    assert signal.support_ids.tolist() == [7, 4, 2]
    np.testing.assert_allclose(np.exp(signal.support_logprobs), [0.5, 0.25, 1.0], rtol=1e-6)
    assert np.exp(signal.tail_logprob[0]) == pytest.approx(0.25, rel=1e-6)
    assert signal.tail_logprob[1] == -np.inf
    assert np.exp(signal.next_token_logprob[0]) == pytest.approx(0.25, rel=1e-6)
    assert np.isnan([signal.next_token_logprob[1], *signal.entropy]).all()


def test_signal_with_more_entries_than_are_kept_gives_them_to_the_tail() -> None:
    sequence = build_sequence({1: 0.1, 2: 0.4, 3: 0.2, 4: 0.3})
    for normalization in ("vocabulary", "support"):
        signal = build_signal(sequence, build_rules(normalization=normalization))
        assert signal.support_ids.tolist() == [2, 4, 3]
        assert np.exp(signal.tail_logprob[0]) == pytest.approx(0.1, rel=1e-5)


def test_signal_over_its_support_has_no_tail_and_a_sum_of_one() -> None:
    signal = build_signal(build_sequence({1: 0.502, 2: 0.502}), build_rules(normalization="support"))
    np.testing.assert_allclose(np.exp(signal.support_logprobs), [0.5, 0.5], rtol=1e-6)
    assert signal.tail_logprob[0] == -np.inf


def test_signal_whose_sum_is_a_little_above_one_is_scaled_back() -> None:
    signal = build_signal(build_sequence({1: 0.606, 2: 0.404}), RULES)
    np.testing.assert_allclose(np.exp(signal.support_logprobs), [0.6, 0.4], rtol=1e-6)
    assert signal.tail_logprob[0] == -np.inf


def test_signal_of_a_position_without_entries_is_all_tail() -> None:
    signal = build_signal(build_sequence({1: 0.5}, {}), RULES)
    assert signal.support_counts.tolist() == [1, 0]
    assert signal.tail_logprob[1] == 0.0


@pytest.mark.parametrize(
    ("sequence", "rules", "reason", "detail"),
    [
        (build_sequence({1: 0.5}, {10: 0.5}), RULES, "token_out_of_range", "position 1: expected ids below 10"),
        (build_sequence({-1: 0.5}), RULES, "token_out_of_range", "position 0: expected ids below 10, found -1"),
        (build_sequence({1: 0.5}, tokens=[0, 12]), RULES, "token_out_of_range", "token 1: expected ids below 10"),
        (build_sequence({1: 0.5}, {1: np.nan}), RULES, "invalid_signal", "position 1: expected logprobs, found nan"),
        (build_sequence({1: 1.5}), RULES, "invalid_signal", "position 0: expected logprobs, found 0.405"),
        (build_sequence({1: 0.7, 2: 0.4}), RULES, "invalid_signal", "with a sum of at most 1, found 1.1"),
        (build_sequence({1: 0.7}), build_rules(normalization="support"), "invalid_signal", "a sum of 1, found 0.7"),
    ],
)  # fmt: skip
def test_signal_of_bad_values_is_rejected_and_says_where(
    sequence: ForeignSequence, rules: SignalRules, reason: str, detail: str
) -> None:
    with pytest.raises(RejectedRowError) as caught:
        build_signal(sequence, rules)
    assert caught.value.reason == reason
    assert detail in caught.value.detail


def test_signal_with_an_id_twice_is_rejected() -> None:
    sequence = build_sequence({1: 0.5, 2: 0.25, 3: 0.1})
    repeated = ForeignSequence(**{**vars(sequence), "ids": np.array([1, 2, 1])})
    with pytest.raises(RejectedRowError, match="position 0: expected every id once, found 1 twice"):
        build_signal(repeated, RULES)


@given(
    seed=st.integers(0, 2**32 - 1),
    normalization=st.sampled_from(["vocabulary", "support"]),
    top_k=st.integers(1, 6),
    dtype=st.sampled_from([np.float16, np.float32]),
)
def test_signal_of_any_distribution_keeps_the_invariants_of_the_format(
    seed: int, normalization: str, top_k: int, dtype: type
) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, generator.choice([0.1, 3.0, 20.0]), (7, 10))
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = np.argsort(-logprobs, axis=1)[:, :6]
    values = np.take_along_axis(logprobs, ids, axis=1)
    if normalization == "support":
        values -= np.logaddexp.reduce(values, axis=1, keepdims=True)
    shuffled = generator.permutation(6)
    row = ForeignRow(
        token_ids=generator.integers(0, 10, 8),
        loss_mask=np.ones(7, dtype=bool),
        ids=ids[:, shuffled],
        logprobs=values[:, shuffled].astype(dtype).astype(np.float32),
        segments=None,
    )
    [sequence] = split_row(row)
    signal = build_signal(sequence, build_rules(normalization=normalization, top_k=top_k))
    record = Record(
        address=RecordAddress(unit=0, index=0),
        token_ids=sequence.token_ids.astype(np.int32),
        loss_mask=sequence.loss_mask,
        signal=signal,
    )
    header = ShardHeader(
        format_version=FORMAT_VERSION,
        unit=0,
        plan_fingerprint="0" * 64,
        vocab_size=10,
        codec=Float32Codec(),
        unknown_scalars=("entropy", "next_token_logprob"),
    )
    assert list(find_violations(RecordBatch.from_records([record]), header)) == []


def build_row(tokens: int, rows: int, **changes: Any) -> ForeignRow:
    values: dict[str, Any] = {
        "token_ids": np.arange(tokens),
        "loss_mask": np.ones(rows, dtype=bool),
        "ids": np.arange(rows)[:, None] * 10 + np.arange(2),
        "logprobs": np.full((rows, 2), -1.0, dtype=np.float32),
        "segments": None,
    }
    return ForeignRow(**{**values, **changes})


@pytest.mark.parametrize("rows", [4, 5])
def test_row_with_or_without_entries_for_its_last_token_has_one_position_less_than_tokens(rows: int) -> None:
    [sequence] = split_row(build_row(5, rows))
    assert sequence.token_ids.tolist() == [0, 1, 2, 3, 4]
    assert sequence.ids.tolist() == [0, 1, 10, 11, 20, 21, 30, 31]


def test_row_of_packed_sequences_is_taken_apart_and_padding_dropped() -> None:
    first, second = split_row(build_row(8, 8, segments=np.array([1, 1, 1, 2, 2, 3, 0, 0])))
    assert (first.token_ids.tolist(), first.offset) == ([0, 1, 2], 0)
    assert first.ids.tolist() == [0, 1, 10, 11]
    assert (second.token_ids.tolist(), second.offset) == ([3, 4], 3)
    assert second.ids.tolist() == [30, 31]


def test_row_leaves_out_unused_slots_and_does_not_teach_positions_without_entries() -> None:
    logprobs = np.array([[-1.0, PADDING_LOGPROB], [-np.inf, -1e9], [-1.0, np.nan]], dtype=np.float32)
    [sequence] = split_row(build_row(4, 3, logprobs=logprobs))
    assert sequence.counts.tolist() == [1, 0, 2]
    assert sequence.loss_mask.tolist() == [True, False, True]


@pytest.mark.parametrize("segments", [None, np.array([1]), np.array([0])])
def test_row_of_a_single_token_is_rejected(segments: np.ndarray | None) -> None:
    with pytest.raises(RejectedRowError, match="expected two tokens or more"):
        split_row(build_row(1, 1, segments=segments))
