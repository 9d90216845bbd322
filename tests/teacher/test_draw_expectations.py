"""What is drawn, against its expectation: constants, unbiasedness, variances and the error of mean gradients.

Seeds are fixed, and bounds chosen so that another seed would break one of them with a probability below 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from logitstore.teacher.draw_key import build_draw_key
from logitstore.teacher.draws import DrawKeys
from logitstore.teacher.protocol import HeadTailMethod, Method, SampleMethod, TopKMethod
from logitstore.teacher.sparse_rows import SparseRows
from logitstore.teacher.sparsify import sparsify

DRAWN = [SampleMethod(num_draws=28), HeadTailMethod(threshold=1 / 28)]


def zipf(vocab_size: int) -> np.ndarray:
    masses = 1 / np.arange(1, vocab_size + 1)
    return masses / masses.sum()


def sparsify_rows(logits: torch.Tensor, method: Method, seed: int = 0) -> SparseRows:
    randomness = DrawKeys.build([build_draw_key(seed, 0, 0)], [len(logits)], "cpu")
    return sparsify(logits, torch.zeros(len(logits), dtype=torch.int64), method, randomness)


def compute_weights(rows: SparseRows, vocab_size: int) -> np.ndarray:
    """[R, V] float64: the target of each row."""
    is_entry = torch.arange(rows.ids.shape[1]) < rows.counts[:, None]
    values = rows.logprobs.double().exp().masked_fill(~is_entry, 0.0)
    ids = rows.ids.masked_fill(~is_entry, 0)
    return torch.zeros(len(ids), vocab_size, dtype=torch.float64).scatter_add_(1, ids, values).numpy()


def draw_weights(probabilities: np.ndarray, method: Method, num_rows: int, seed: int = 0) -> np.ndarray:
    logits = torch.from_numpy(probabilities).log().float().expand(num_rows, -1)
    return compute_weights(sparsify_rows(logits, method, seed), len(probabilities))


def compute_variances(probabilities: np.ndarray, method: Method) -> np.ndarray:
    """[V] of one target's entries."""
    if isinstance(method, SampleMethod):
        return probabilities * (1 - probabilities) / method.num_draws
    assert isinstance(method, HeadTailMethod)
    is_head = probabilities >= method.threshold
    while True:
        mass = probabilities[~is_head].sum()
        slot = mass / max(1, math.ceil(mass / method.threshold - 1e-6))
        if (probabilities[~is_head] <= slot).all():
            return np.where(is_head, 0.0, slot * probabilities * (1 - np.minimum(probabilities / slot, 1.0)))
        is_head |= probabilities > slot


def test_top_k_of_zipf_has_the_published_constants() -> None:
    probabilities = zipf(100_000)
    rows = sparsify_rows(torch.from_numpy(np.log(probabilities))[None], TopKMethod(k=20))
    kept, tail = rows.logprobs[0].double().exp(), rows.tail_logprob.double().exp().item()
    assert kept[0].item() == pytest.approx(0.08271, abs=5e-6)
    assert kept.sum().item() == pytest.approx(0.29758, abs=5e-6)
    assert tail == pytest.approx(1 - 0.29758, abs=5e-6)
    assert (kept[:2] / kept.sum()).tolist() == pytest.approx([0.27795, 0.13898], abs=5e-6)
    # The tail's mass given to the token that comes next, on average over that token.
    assert kept[0].item() * (1 + tail) == pytest.approx(0.14081, abs=5e-6)


@pytest.mark.slow
def test_sample_of_zipf_keeps_the_expected_number_of_distinct_ids() -> None:
    probabilities = zipf(100_000)
    missed = (1 - probabilities) ** 50
    expected = (1 - missed).sum()
    assert expected == pytest.approx(43.03, abs=0.005)
    logits = torch.from_numpy(np.log(probabilities)).float().expand(20, -1)
    counts = torch.cat([sparsify_rows(logits, SampleMethod(num_draws=50), seed).counts for seed in range(20)]).double()
    error = counts.std().item() / math.sqrt(len(counts))
    assert error < 0.15
    assert abs(counts.mean().item() - expected) < 5 * error


def test_sample_draws_are_distributed_as_the_teacher_is() -> None:
    probabilities = zipf(40)
    counts = draw_weights(probabilities, SampleMethod(num_draws=20), 5000).sum(0) * 20
    expected = 5000 * 20 * probabilities
    # Chi-square with 39 degrees of freedom exceeds this with a probability of 1e-6.
    assert ((counts - expected) ** 2 / expected).sum() < 98.4


@pytest.mark.parametrize("method", [*DRAWN, SampleMethod(num_draws=1), HeadTailMethod(threshold=1.0)])
@pytest.mark.parametrize("scale", [0.2, 1.5, 4.0])
def test_mean_of_many_targets_is_the_teacher_within_the_standard_error_of_each_entry(
    method: Method, scale: float
) -> None:
    logits = np.random.default_rng(1).normal(0, scale, 300)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    num_targets = 10_000
    mean = np.mean([draw_weights(probabilities, method, 2500, seed).mean(0) for seed in range(4)], axis=0)
    errors = np.sqrt(compute_variances(probabilities, method) / num_targets)
    # Two slots' weights for what a normal approximation misses of ids that are drawn once in thousands of targets.
    allowed = 6 * errors + 12 * compute_slot(probabilities, method) / num_targets
    assert (np.abs(mean - probabilities) < allowed + 1e-7).all()
    assert mean.sum() == pytest.approx(1.0, abs=1e-6)


def compute_slot(probabilities: np.ndarray, method: Method) -> float:
    """What a drawn id weighs at least."""
    return 1 / method.num_draws if isinstance(method, SampleMethod) else getattr(method, "threshold", 0.0)


@pytest.mark.parametrize("scale", [0.2, 1.5, 4.0])
def test_variance_of_every_entry_is_as_reckoned_and_less_with_a_head(scale: float) -> None:
    logits = np.random.default_rng(2).normal(0, scale, 300)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    expected = [compute_variances(probabilities, method) for method in DRAWN]
    assert (expected[1] <= expected[0]).all()
    for method, variances in zip(DRAWN, expected, strict=True):
        squares = (draw_weights(probabilities, method, 6000) - probabilities) ** 2
        error = np.sqrt(squares.sum(1).var() / len(squares))
        assert abs(squares.sum(1).mean() - variances.sum()) < 5 * error
        # Entries of which more than 400 rows out of 6000 tell: the error of a variance is below 5%.
        likely = variances * 6000 > 400 / 28**2
        assert np.abs(squares.mean(0)[likely] / variances[likely] - 1).max() < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("method", DRAWN)
def test_free_logits_taught_by_ever_new_targets_end_at_the_teacher(method: Method) -> None:
    logits = np.random.default_rng(3).normal(0, 2.0, 50)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    taught = torch.zeros(50, dtype=torch.float64)
    average = torch.zeros(50, dtype=torch.float64)
    for step in range(150):
        targets = torch.from_numpy(draw_weights(probabilities, method, 200, step))
        # The gradient of cross-entropy, by a rate that is right for small probabilities and large ones.
        taught -= 20.0 * (taught.softmax(0) - targets.mean(0))
        if step >= 50:
            average += taught.softmax(0) / 100
    # Of five series of draws each, which also differ between processors, 0.008 to 0.013 were found; after as many steps
    # on the teacher's own probabilities 0.010, on those of the likeliest eight 0.108.
    assert np.abs(average.numpy() - probabilities).sum() < 0.02
    kept = sparsify_rows(torch.from_numpy(logits)[None], TopKMethod(k=8))
    assert (1 - kept.tail_logprob.exp()).item() < 0.95  # the same of the likeliest eight alone would end elsewhere


def compute_head_gradient(weights: np.ndarray, student: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """[V, D] of the mean cross-entropy between targets and a student, by the weights of its head."""
    gradient: np.ndarray = (student - weights).T @ hidden / len(hidden)
    return gradient


def measure_angles(methods: Sequence[Method], sizes: Sequence[int], num_repeats: int = 4) -> np.ndarray:
    """[methods, sizes]: degrees between the head's mean gradient by sparse targets and by whole ones, root mean square.

    The teacher is a linear head over a Zipf distribution, the student has learned half of it.
    """
    generator = np.random.default_rng(5)
    teacher_head, other_head = generator.normal(0, 1, (2, 400, 8))
    bias = 0.9 * np.log(zipf(400))
    squares = np.zeros((num_repeats, len(methods), len(sizes)))
    for repeat in range(num_repeats):
        hidden = generator.normal(0, 1, (max(sizes), 8))
        logits = 0.5 * hidden @ teacher_head.T + bias
        dense = np.exp(compute_logprobs(logits))
        student = np.exp(compute_logprobs(hidden @ (0.25 * teacher_head + 0.2 * other_head).T + bias))
        for i, method in enumerate(methods):
            sparse = compute_weights(sparsify_rows(torch.from_numpy(logits), method, repeat), 400)
            sparse /= sparse.sum(-1, keepdims=True)
            for j, size in enumerate(sizes):
                whole, part = (compute_head_gradient(w[:size], student[:size], hidden[:size]) for w in (dense, sparse))
                cosine = (whole * part).sum() / np.linalg.norm(whole) / np.linalg.norm(part)
                squares[repeat, i, j] = math.degrees(math.acos(cosine)) ** 2
    angles: np.ndarray = np.sqrt(squares.mean(0))
    return angles


def compute_logprobs(logits: np.ndarray) -> np.ndarray:
    logprobs: np.ndarray = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return logprobs


@pytest.mark.slow
def test_angle_of_the_mean_gradient_falls_with_the_root_of_the_positions_unless_the_tail_is_never_taught() -> None:
    angles = measure_angles([*DRAWN, TopKMethod(k=12)], (128, 512, 2048))
    drawn, top_k = angles[:2], angles[2]
    ratios = drawn[:, :-1] / drawn[:, 1:]
    assert (ratios > 1.6).all()
    assert (ratios < 2.5).all()
    assert top_k.min() > 25
    assert top_k[2] > 0.9 * top_k[1]
    # With a head the noise is less, for as many draws as slots.
    assert (drawn[1] < 0.8 * drawn[0]).all()
