"""The losses with a gradient written by hand against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.loss.divergences import bucket_forward_kl, cross_entropy
from trainer.loss.sparse_logits import compute_sparse_losses

VOCAB_SIZE, K = 40, 6


def draw_case(seed: int, *, scale: float = 3.0) -> dict[str, torch.Tensor]:
    """Ragged supports (none to K slots, empty ones hold id 0), next tokens inside and outside of them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (5, 7)
    teacher = scale * torch.randn(*shape, VOCAB_SIZE, dtype=torch.float64, generator=generator)
    ranked, ids = teacher.log_softmax(-1).sort(-1, descending=True)
    counts = torch.randint(0, K + 1, (*shape, 1), generator=generator)
    is_filled = torch.arange(K) < counts
    outside = ranked.masked_fill(torch.arange(VOCAB_SIZE) < counts, -math.inf)
    return {
        "student_logits": scale * torch.randn(*shape, VOCAB_SIZE, dtype=torch.float64, generator=generator),
        "next_ids": torch.randint(0, VOCAB_SIZE, shape, generator=generator),
        "support_ids": torch.where(is_filled, ids[..., :K], 0),
        "support_logprobs": torch.where(is_filled, ranked[..., :K], -math.inf),
        "tail_logprob": outside.logsumexp(-1),
    }


def compute_reference(
    student_logits: torch.Tensor,
    next_ids: torch.Tensor,
    support_ids: torch.Tensor,
    support_logprobs: torch.Tensor,
    tail_logprob: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    kl = bucket_forward_kl(student_logits, support_ids, support_logprobs, tail_logprob)
    return kl, cross_entropy(student_logits, next_ids)


def differentiate(
    function: object, case: dict[str, torch.Tensor], kl_weight: torch.Tensor, ce_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = case["student_logits"].clone().requires_grad_()
    kl, ce = function(**{**case, "student_logits": logits})  # type: ignore[operator]
    (kl_weight * kl + ce_weight * ce).sum().backward()
    assert logits.grad is not None
    return kl.detach(), ce.detach(), logits.grad


@pytest.mark.parametrize(("kl_weight", "ce_weight"), [(1.0, 0.0), (0.0, 1.0), (0.8, 0.2)])
def test_losses_and_gradients_equal_autograd_of_the_definitions(kl_weight: float, ce_weight: float) -> None:
    case = draw_case(seed=0)
    # Another weight at every position, as masks and the normalization make them.
    position_weight = torch.rand(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = kl_weight * position_weight, ce_weight * position_weight
    found, expected = (
        differentiate(function, case, *weights) for function in (compute_sparse_losses, compute_reference)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_losses_of_the_whole_vocabulary_as_support_have_the_dense_gradient() -> None:
    case = draw_case(seed=2)
    teacher = torch.randn(5, 7, VOCAB_SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    everything = torch.arange(VOCAB_SIZE).expand(5, 7, VOCAB_SIZE)
    no_tail = torch.full((5, 7), -math.inf, dtype=torch.float64)
    case.update(support_ids=everything, support_logprobs=teacher.log_softmax(-1), tail_logprob=no_tail)
    one = torch.ones(5, 7, dtype=torch.float64)
    _, _, gradient = differentiate(compute_sparse_losses, case, one, 0 * one)
    expected = case["student_logits"].softmax(-1) - teacher.softmax(-1)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_lower_precision_err_no_more_than_float32_does(dtype: torch.dtype) -> None:
    case = draw_case(seed=4)
    case["student_logits"] = case["student_logits"].to(dtype)
    low = {name: t.float() if t.dtype == torch.float64 else t for name, t in case.items()}
    one = torch.full((5, 7), 0.5)
    kl, ce, gradient = differentiate(compute_sparse_losses, low, one, one)
    exact = differentiate(compute_reference, {**case, "student_logits": case["student_logits"].double()}, one, one)
    assert gradient.dtype == dtype
    assert kl.dtype == ce.dtype == torch.float32
    # Logits are around 10, float32 holds them to 1e-6; a gradient is rounded to the logits' dtype once.
    torch.testing.assert_close(kl.double(), exact[0], rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(ce.double(), exact[1], rtol=1e-5, atol=5e-6)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), exact[2], rtol=rounding, atol=5e-6)


def test_gradient_of_a_tiny_tail_is_exact_in_float32() -> None:
    """1 - Q and expm1 lose a tail of 1e-9 in float32; the sum over the tail does not."""
    logits = torch.full((1, 1, VOCAB_SIZE), -20.0)
    logits[..., :2] = 3.0
    case = {
        "student_logits": logits,
        "next_ids": torch.zeros(1, 1, dtype=torch.int64),
        "support_ids": torch.tensor([[[0, 1]]]),
        "support_logprobs": torch.tensor([[[0.6, 0.3]]]).log(),
        "tail_logprob": torch.tensor([[0.1]]).log(),
    }
    one = torch.ones(1, 1)
    _, _, gradient = differentiate(compute_sparse_losses, case, one, 0 * one)
    # The tail's part of the gradient is q_r - r.
    assert gradient[..., 2:].sum().item() == pytest.approx(-0.1, rel=1e-5)


def test_losses_of_a_student_without_tail_are_finite() -> None:
    case = draw_case(seed=5)
    far = torch.full_like(case["student_logits"], -2000.0).scatter(-1, case["support_ids"], 1.0)
    case["student_logits"] = far
    one = torch.ones(5, 7, dtype=torch.float64)
    kl, _, gradient = differentiate(compute_sparse_losses, case, one, 0 * one)
    assert torch.isfinite(kl).all()
    assert torch.isfinite(gradient).all()


def test_second_backward_fails_instead_of_being_wrong() -> None:
    case = draw_case(seed=6)
    logits = case["student_logits"].requires_grad_()
    kl, _ = compute_sparse_losses(**case)
    torch.autograd.grad(kl.sum(), logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(kl.sum(), logits)
