from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitstore.errors import TeacherError
from logitstore.teacher.protocol import TopKMethod
from logitstore.teacher.sparsify import InvalidLogitsError, SparseRows, sparsify


def draw_logits(seed: int, rows: int, vocab_size: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(seed)
    logits = generator.uniform(-spread, spread, (rows, vocab_size)).astype(np.float32)
    next_ids = generator.integers(0, vocab_size, rows)
    return torch.from_numpy(logits), torch.from_numpy(next_ids)


def compute_logprobs(logits: torch.Tensor) -> np.ndarray:
    values = logits.double().numpy()
    return values - np.logaddexp.reduce(values, axis=-1, keepdims=True)


def check_against_dense(rows: SparseRows, logits: torch.Tensor, next_ids: torch.Tensor, atol: float = 2e-5) -> None:
    """Hold every output to the float64 reference; the allowed error is float32's rounding of logits up to 80."""
    dense = compute_logprobs(logits)
    for row, logprobs in enumerate(dense):
        count = int(rows.counts[row])
        ids = rows.ids[row, :count].numpy()
        kept = rows.logprobs[row, :count].numpy()
        assert len(set(ids.tolist())) == count
        np.testing.assert_allclose(kept, logprobs[ids], rtol=1e-6, atol=atol)
        assert (np.diff(kept) <= 0).all()
        outside = np.delete(logprobs, ids)
        assert outside.size == 0 or outside.max() <= logprobs[ids].min()
        tail = np.logaddexp.reduce(outside) if outside.size else -np.inf
        np.testing.assert_allclose(rows.tail_logprob[row].item(), tail, rtol=1e-6, atol=atol)
        entropy = -np.sum(np.exp(logprobs) * np.where(np.isfinite(logprobs), logprobs, 0.0))
        np.testing.assert_allclose(rows.entropy[row].item(), entropy, rtol=1e-5, atol=atol)
        expected_next = logprobs[int(next_ids[row])]
        np.testing.assert_allclose(rows.next_token_logprob[row].item(), expected_next, rtol=1e-6, atol=atol)


@given(
    seed=st.integers(0, 2**31),
    vocab_size=st.integers(5, 1000),
    k=st.integers(1, 1200),
    spread=st.sampled_from([0.0, 0.5, 4.0, 80.0]),
    top_p=st.sampled_from([None, 0.1, 0.9, 1.0]),
)
def test_sparsify_any_shape_and_spread_matches_float64(
    seed: int, vocab_size: int, k: int, spread: float, top_p: float | None
) -> None:
    logits, next_ids = draw_logits(seed, 4, vocab_size, spread)
    rows = sparsify(logits, next_ids, TopKMethod(k=k, top_p=top_p))
    check_against_dense(rows, logits, next_ids)


@given(seed=st.integers(0, 2**31), vocab_size=st.integers(5, 300))
def test_sparsify_bfloat16_logits_matches_float64_of_the_same_logits(seed: int, vocab_size: int) -> None:
    logits, next_ids = draw_logits(seed, 3, vocab_size, 20.0)
    rows = sparsify(logits.bfloat16(), next_ids, TopKMethod(k=7))
    assert rows.logprobs.dtype == rows.tail_logprob.dtype == rows.entropy.dtype == torch.float32
    check_against_dense(rows, logits.bfloat16(), next_ids)


def test_sparsify_with_almost_all_mass_in_support_keeps_the_digits_of_the_tail() -> None:
    logits = torch.full((1, 1000), -30.0)
    logits[0, 3] = 20.0
    rows = sparsify(logits, torch.tensor([0]), TopKMethod(k=1))
    expected = np.log(999) - 50.0
    assert rows.tail_logprob.item() == pytest.approx(expected, abs=1e-5)
    assert rows.logprobs[0, 0].item() == pytest.approx(-999 * np.exp(-50.0), rel=1e-5)
    assert rows.entropy.item() == pytest.approx(999 * np.exp(-50.0) * 51, rel=1e-4)


def test_sparsify_with_tail_below_float32_exponentials_still_finds_its_logprob() -> None:
    logits = torch.tensor([[100.0, -50.0, -51.0, -400.0], [0.0, 0.0, -1.0, -2.0]])
    rows = sparsify(logits, torch.tensor([3, 0]), TopKMethod(k=1))
    assert rows.tail_logprob[0].item() == pytest.approx(-150 + np.log1p(np.exp(-1.0)), abs=2e-5)
    assert rows.next_token_logprob[0].item() == -500.0
    check_against_dense(rows, logits, torch.tensor([3, 0]))


@pytest.mark.parametrize("k", [5, 6, 1000])
def test_sparsify_with_k_of_at_least_the_vocabulary_leaves_no_tail(k: int) -> None:
    logits, next_ids = draw_logits(0, 8, 5, 3.0)
    rows = sparsify(logits, next_ids, TopKMethod(k=k))
    assert (rows.counts == 5).all()
    assert torch.isneginf(rows.tail_logprob).all()


def test_sparsify_with_k_below_the_vocabulary_has_a_finite_tail() -> None:
    logits, next_ids = draw_logits(1, 64, 50, 80.0)
    assert sparsify(logits, next_ids, TopKMethod(k=49)).tail_logprob.isfinite().all()


def test_sparsify_with_one_id_gives_it_all_the_mass() -> None:
    rows = sparsify(torch.tensor([[3.5]]), torch.tensor([0]), TopKMethod(k=4))
    assert (rows.counts.item(), rows.logprobs.item(), rows.entropy.item()) == (1, 0.0, 0.0)
    assert rows.tail_logprob.item() == -np.inf


@pytest.mark.parametrize(
    ("top_p", "min_k", "expected"),
    [(0.5, 1, 1), (0.500001, 1, 2), (0.8, 1, 3), (0.8, 4, 4), (0.99, 1, 4), (0.1, 2, 2), (1.0, 1, 4)],
)
def test_sparsify_nucleus_keeps_up_to_the_first_slot_that_reaches_the_mass(
    top_p: float, min_k: int, expected: int
) -> None:
    masses = torch.tensor([[0.1, 0.5, 0.15, 0.2, 0.05]], dtype=torch.float64)
    # Half a unit of float32 rounding must not decide: 0.5 is exact, and 0.5 + 0.2 lies well below 0.8.
    rows = sparsify(masses.log(), torch.tensor([0]), TopKMethod(k=4, top_p=top_p - 1e-7, min_k=min_k))
    assert rows.counts.item() == expected
    kept = masses[0].sort(descending=True).values[:expected].sum().item()
    assert rows.tail_logprob.exp().item() == pytest.approx(1.0 - kept, abs=1e-6)


def test_sparsify_with_ids_of_probability_zero_keeps_them_out_of_the_support() -> None:
    inf = float("inf")
    logits = torch.tensor([[-inf, 1.0, -inf, 2.0, -inf], [0.0, 0.0, 0.0, 0.0, -inf]])
    rows = sparsify(logits, torch.tensor([0, 4]), TopKMethod(k=4, min_k=4, top_p=0.2))
    assert rows.counts.tolist() == [2, 4]
    assert rows.ids[0, :2].tolist() == [3, 1]
    assert torch.isneginf(rows.tail_logprob).all()
    assert torch.isneginf(rows.next_token_logprob).all()
    check_against_dense(rows, logits, torch.tensor([0, 4]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 500, 999])
def test_sparsify_with_one_unusable_logit_names_row_and_id(value: float, column: int) -> None:
    logits, next_ids = draw_logits(2, 5, 1000, 3.0)
    logits[3, column] = value
    with pytest.raises(InvalidLogitsError, match=f"at id {column}$") as caught:
        sparsify(logits, next_ids, TopKMethod(k=8))
    assert caught.value.row == 3
    assert isinstance(caught.value, TeacherError)


def test_sparsify_with_a_row_of_nothing_but_minus_infinity_names_the_row() -> None:
    logits, next_ids = draw_logits(2, 3, 10, 3.0)
    logits[1] = -float("inf")
    with pytest.raises(InvalidLogitsError, match=r"row 1: .* no id of finite logit"):
        sparsify(logits, next_ids, TopKMethod(k=8))


def test_sparsify_does_not_change_its_input() -> None:
    logits, next_ids = draw_logits(3, 4, 30, 80.0)
    before = logits.clone()
    sparsify(logits, next_ids, TopKMethod(k=3))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("mask", [-30_000.0, torch.finfo(torch.float32).min, -math.inf])
def test_ids_that_a_model_masks_enter_no_support_whatever_number_masks_them(mask: float) -> None:
    logits = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    logits[:, 3:] = mask
    rows = sparsify(logits, torch.tensor([0, 1, 5, 11]), TopKMethod(k=8))
    assert rows.counts.tolist() == [3] * 4
    assert rows.tail_logprob.tolist() == [-math.inf] * 4
    assert rows.next_token_logprob[2:].tolist() == [-math.inf] * 2
    assert rows.next_token_logprob[:2].isfinite().all()
    assert rows.entropy.isfinite().all()
