"""Distances of two stores' signals: the least that both allow, held to full distributions and to a search."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import build_records, build_signal
from made_up_draws import build_drawn_records

from logitstore.comparison import compare_signals
from logitstore.errors import ShapeError
from logitstore.records import RecordBatch

VOCAB = 30


def build_batch(logits: np.ndarray, top_k: int, counts: np.ndarray | None = None) -> RecordBatch:
    """A batch of one record with the signal of [T, V] logits."""
    [record] = build_records(1, length=len(logits), vocab_size=logits.shape[1], ragged=False)
    return RecordBatch.from_records([replace(record, signal=build_signal(logits, record.token_ids[1:], top_k, counts))])


def normalize(logits: np.ndarray) -> np.ndarray:
    logprobs: np.ndarray = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return logprobs


def draw_logits(seed: int, likeness: float) -> tuple[np.ndarray, np.ndarray]:
    """Two teachers' [T, V] logits, the more alike the nearer `likeness` is to 1."""
    generator = np.random.default_rng(seed)
    one, two = generator.normal(0, 3, (2, 9, VOCAB))
    return one, likeness * one + (1 - likeness) * two


@given(
    seed=st.integers(0, 10_000), likeness=st.sampled_from([0.0, 0.5, 0.95]), tops=st.tuples(*[st.integers(1, 30)] * 2)
)
@settings(max_examples=80, deadline=None)
def test_distances_are_never_above_those_of_the_full_distributions(
    seed: int, likeness: float, tops: tuple[int, int]
) -> None:
    one, two = draw_logits(seed, likeness)
    found = compare_signals(build_batch(one, tops[0]), build_batch(two, tops[1]))
    p, q = np.exp(normalize(one)), np.exp(normalize(two))
    kl = (p * np.log(p / q)).sum(axis=1)
    reverse_kl = (q * np.log(q / p)).sum(axis=1)
    assert (found.kl <= kl + 1e-5).all()
    assert (found.reverse_kl <= reverse_kl + 1e-5).all()
    assert (found.total_variation <= np.abs(p - q).sum(axis=1) / 2 + 1e-6).all()
    np.testing.assert_array_equal(found.agrees, p.argmax(axis=1) == q.argmax(axis=1))
    assert found.is_comparable.all()
    if tops == (VOCAB, VOCAB):
        np.testing.assert_allclose(found.kl, kl, atol=1e-5)


def test_whole_vocabularies_have_the_distances_of_their_distributions() -> None:
    one, two = draw_logits(3, 0.5)
    found = compare_signals(build_batch(one, VOCAB), build_batch(two, VOCAB))
    p, q = np.exp(normalize(one)), np.exp(normalize(two))
    np.testing.assert_allclose(found.kl, (p * np.log(p / q)).sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.reverse_kl, (q * np.log(q / p)).sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.total_variation, np.abs(p - q).sum(axis=1) / 2, rtol=1e-5)


def search_least(
    common: list[tuple[float, float]], only_p: float, tail_p: float, only_q: float, tail_q: float
) -> tuple[float, float]:
    """The least KL and total variation over a fine grid of what either tail may hold of the other's tokens."""

    def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(p > 0, p * np.log(p / q), 0.0)

    y, x = np.meshgrid(np.linspace(0, tail_q, 401), np.linspace(0, tail_p, 401))
    sums = kl(np.full_like(y, only_p), y) + kl(x, np.full_like(x, only_q)) + kl(tail_p - x, tail_q - y)
    distances = (abs(only_p - y) + abs(x - only_q) + abs((tail_p - x) - (tail_q - y))) / 2
    of_common = sum(float(kl(np.array(p), np.array(q))) for p, q in common)
    return of_common + np.nanmin(sums), sum(abs(p - q) for p, q in common) / 2 + distances.min()


@pytest.mark.parametrize("seed", range(6))
def test_distances_are_the_least_that_both_signals_allow(seed: int) -> None:
    one, two = draw_logits(seed, 0.3)
    top_k = 1 + seed % 5
    first, second = build_batch(one, top_k), build_batch(two, top_k + 2)
    found = compare_signals(first, second)
    for t in range(len(one)):
        p, q = (
            dict(zip(*map(np.ndarray.tolist, batch.record(0).signal.support_at(t)), strict=True))
            for batch in (first, second)
        )
        p, q = ({token: np.exp(logprob) for token, logprob in one_side.items()} for one_side in (p, q))
        tail_p, tail_q = 1 - sum(p.values()), 1 - sum(q.values())
        common = [(p[token], q[token]) for token in p.keys() & q.keys()]
        only_p, only_q = (sum(x for token, x in a.items() if token not in b) for a, b in ((p, q), (q, p)))
        kl, variation = search_least(common, only_p, tail_p, only_q, tail_q)
        assert found.kl[t] == pytest.approx(kl, abs=1e-2)
        assert found.kl[t] <= kl + 1e-6
        assert found.total_variation[t] == pytest.approx(variation, abs=1e-2)


def test_supports_without_a_common_token_are_far_apart() -> None:
    logits = np.full((1, VOCAB), -8.0)
    one, two = logits.copy(), logits.copy()
    one[0, 3] = two[0, 4] = 8.0
    found = compare_signals(build_batch(one, 1), build_batch(two, 1))
    assert found.kl[0] > 10
    assert found.total_variation[0] == pytest.approx(1, abs=1e-4)
    assert not found.agrees[0]


def test_a_signal_is_no_distance_from_itself_and_from_a_shorter_one_of_its_own() -> None:
    one, _ = draw_logits(1, 1.0)
    batch = build_batch(one, 8)
    for other in (batch, build_batch(one, 3), build_batch(one, 8, np.arange(1, 10))):
        for found in (compare_signals(batch, other), compare_signals(other, batch)):
            np.testing.assert_allclose(found.kl, 0, atol=1e-6)
            np.testing.assert_allclose(found.total_variation, 0, atol=1e-6)
            assert found.agrees.all()


def test_what_one_holds_impossible_is_infinitely_far() -> None:
    one, two = draw_logits(2, 0.5)
    two[:, 5:] = -np.inf
    with np.errstate(invalid="ignore"):
        found = compare_signals(build_batch(one, VOCAB), build_batch(two, 5))
    assert np.isinf(found.kl).all()
    assert np.isfinite(found.reverse_kl).all()


@pytest.mark.parametrize("kind", ["sample", "head_tail"])
def test_drawn_entries_are_part_of_the_tail(kind: str) -> None:
    batch = RecordBatch.from_records(build_drawn_records(3, kind))
    found = compare_signals(batch, batch)
    np.testing.assert_allclose(found.kl, 0, atol=1e-6)
    assert batch.support_draws is not None
    kept = np.add.reduceat(batch.support_draws == 0, np.cumsum(batch.support_counts) - batch.support_counts)
    np.testing.assert_array_equal(found.is_comparable, kept > 0)
    assert not (found.agrees & ~found.is_comparable).any()


def test_signals_of_other_lengths_are_refused() -> None:
    one, two = draw_logits(1, 1.0)
    with pytest.raises(ShapeError, match="expected 9 positions in both, found 4"):
        compare_signals(build_batch(one, 3), build_batch(two[:4], 3))
