"""The compact codec held to a float64 reference, to its bound, and to the divergence that it costs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.shard.compact import (
    bound_logprobs,
    compute_level_logprobs,
    compute_levels,
    decode_steps,
    encode_supports,
    round_scalars,
)


def decode_in_float64(steps: list[int], tail_logprob: float) -> np.ndarray:
    """What FORMAT.md says of one position, slot by slot."""
    levels, probs = 0, []
    for step in steps:
        levels += step
        probs.append((1 - levels / 640) ** 2 if levels <= 632 else np.exp(-np.log(6400) - (levels - 632) / 4))
    left = 1 - np.exp(tail_logprob)
    return np.log(probs) + np.log(left / sum(probs))


def encode(logprobs: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return encode_supports(np.zeros(len(logprobs), dtype=np.int32), logprobs, counts)[1]


def draw_positions(seed: int, counts: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """[N] float32 logprobs, likeliest first at each position, and [P] float32 log of the mass they leave."""
    generator = np.random.default_rng(seed)
    parts, tails = [], []
    for count in counts.tolist():
        logits = generator.normal(0, scale, count + 1)
        logprobs = logits - np.logaddexp.reduce(logits)
        parts.append(-np.sort(-logprobs[:count]))
        tails.append(logprobs[count])
    return np.concatenate([*parts, []]).astype(np.float32), np.array(tails, dtype=np.float32)


@given(
    st.integers(0, 2**32),
    st.lists(st.integers(0, 40), min_size=1, max_size=12),
    st.sampled_from([0.01, 1.0, 5.0, 50.0, 700.0]),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_decoded_supports_follow_the_specification_and_stay_within_the_bound(
    seed: int, counts: list[int], scale: float, is_uniform: bool
) -> None:
    num_entries = np.array([counts[0]] * len(counts) if is_uniform else counts, dtype=np.int32)
    logprobs, tails = draw_positions(seed, num_entries, scale)
    tails = round_scalars(tails)
    steps = encode(logprobs, num_entries)
    decoded = decode_steps(steps, num_entries, tails)
    stops = np.cumsum(num_entries)
    for start, stop, tail in zip(stops - num_entries, stops, tails, strict=True):
        if stop > start and tail < -1e-4 and logprobs[stop - 1] > -80:
            expected = decode_in_float64(steps[start:stop].tolist(), float(tail))
            np.testing.assert_allclose(decoded[start:stop], expected, atol=3e-6, rtol=3e-7)
    assert (np.abs(decoded.astype(np.float64) - logprobs) <= bound_logprobs(logprobs, num_entries)).all()


def test_bound_is_an_eighth_of_a_nat_for_the_unlikely_and_far_less_for_the_likely() -> None:
    """What FORMAT.md promises in numbers, for a support that holds nearly all mass."""
    probs = np.array([0.9, 0.05, 0.01, 1e-3, 1e-5, 1e-8])
    bound = bound_logprobs(np.log(probs).astype(np.float32), np.array([6], np.int32))
    assert bound[0] < 0.01
    assert 1 / 8 < bound[-1] < 1 / 6
    assert (np.diff(bound[:4]) > 0).all()


def test_levels_meet_where_the_scale_changes() -> None:
    np.testing.assert_allclose(compute_level_logprobs(np.array([632])), -np.log(6400), rtol=1e-12)
    logprobs = np.linspace(-20, 0, 200_001).astype(np.float32)
    levels = compute_levels(logprobs)
    assert (np.diff(levels) <= 0).all()
    assert set(np.diff(levels).tolist()) <= {0, -1}  # no level is left out
    error = np.abs(compute_level_logprobs(levels) - logprobs)
    assert error[logprobs < -np.log(6400)].max() <= 1 / 8 + 1e-5


def test_every_level_is_encoded_as_itself() -> None:
    """Before rescaling, that is: nearest means nearest."""
    levels = np.arange(1500)
    np.testing.assert_array_equal(compute_levels(compute_level_logprobs(levels).astype(np.float32)), levels)


@pytest.mark.parametrize("top_k", [8, 64])
def test_rounding_costs_less_divergence_than_engines_disagree_by(top_k: int) -> None:
    """Mean KL below 5e-5 nats; noise of 0.03 nats per logprob, as between two engines, costs ten times as much."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 1, (2000, 4000)) * generator.gamma(4, 0.8, (2000, 1))
    logprobs_PV = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    logprobs = -np.sort(-logprobs_PV, axis=1)[:, :top_k]
    tails = np.log1p(-np.exp(logprobs).sum(1))
    counts = np.full(len(logprobs), top_k, dtype=np.int32)
    decoded = decode_steps(encode(logprobs.ravel().astype(np.float32), counts), counts, tails)
    probs = np.exp(logprobs)
    divergence = (probs * (logprobs - decoded.reshape(logprobs.shape))).sum(1)
    assert divergence.min() > -1e-7
    assert 1e-7 < divergence.mean() < 5e-5


def test_support_after_a_tail_with_all_the_mass_is_not_rescaled() -> None:
    steps, counts = np.array([632], np.uint16), np.array([1], np.int32)
    np.testing.assert_allclose(decode_steps(steps, counts, np.zeros(1, np.float32)), -np.log(6400), rtol=1e-6)


@pytest.mark.parametrize("counts", [[4, 4], [4, 3, 1]])
def test_slots_of_equal_level_are_in_order_of_their_ids(counts: list[int]) -> None:
    logprobs = np.log(np.array([0.5, 0.1, 0.1, 0.1, 0.4, 0.2, 0.2, 0.1], np.float32))
    ids = np.array([900_000, 7, 3, 5, 1, 2_000_000_000, 4, 6], np.int32)
    expected = [900_000, 3, 5, 7, 1, 4, 2_000_000_000, 6]
    assert encode_supports(ids, logprobs, np.array(counts, np.int32))[0].tolist() == expected


def test_positions_without_support_take_no_entry() -> None:
    counts = np.array([0, 2, 0, 1, 0], np.int32)
    tails = np.array([0.0, -3.0, 0.0, -1.0, 0.0], np.float32)
    decoded = decode_steps(np.array([100, 0, 20], np.uint16), counts, tails)
    np.testing.assert_allclose(np.exp(decoded[:2]).sum() + np.exp(-3.0), 1, atol=1e-6)
    np.testing.assert_allclose(np.exp(decoded[2]) + np.exp(-1.0), 1, atol=1e-6)
    assert len(decode_steps(np.zeros(0, np.uint16), np.zeros(3, np.int32), np.zeros(3, np.float32))) == 0


def test_scalars_are_rounded_to_nine_significant_bits_ties_to_even() -> None:
    values = np.array([1 + 2**-9, 1 + 3 * 2**-9, -(1 + 2**-8), 2.0**-140, 3e38], np.float32)
    expected = np.array([1, 1 + 2**-7, -(1 + 2**-8), 0, 3e38], np.float32)
    np.testing.assert_allclose(round_scalars(values), expected, rtol=2**-9 * 1.0001, atol=2.0**-134)
    np.testing.assert_array_equal(round_scalars(values)[:3], expected[:3])
