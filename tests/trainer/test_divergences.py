"""The definitions of the losses against dense float64 arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.loss.divergences import TAIL_LOGPROB_FLOOR, bucket_forward_kl, bucket_overlap, cross_entropy

VOCAB_SIZE = 30


def draw_logits(*shape: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(*shape, VOCAB_SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def take_signal(teacher_logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Support ids, support logprobs and tail logprob of a top-k store, in float64."""
    ranked, ids = teacher_logits.log_softmax(-1).sort(-1, descending=True)
    return ids[..., :k], ranked[..., :k], ranked[..., k:].logsumexp(-1)


def compute_dense_kl(teacher_logits: torch.Tensor, student_logits: torch.Tensor) -> torch.Tensor:
    teacher, student = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1)


def test_bucket_kl_with_the_whole_vocabulary_as_support_equals_dense_kl() -> None:
    teacher, student = draw_logits(4, 5, seed=0), draw_logits(4, 5, seed=1)
    found = bucket_forward_kl(student, *take_signal(teacher, VOCAB_SIZE))
    torch.testing.assert_close(found, compute_dense_kl(teacher, student), rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 5, 29])
def test_bucket_kl_and_the_kl_of_the_tails_add_up_to_dense_kl(k: int) -> None:
    teacher, student = draw_logits(4, 5, seed=2), draw_logits(4, 5, seed=3)
    ids, logprobs, tail = take_signal(teacher, k)
    in_support = torch.zeros_like(teacher, dtype=torch.bool).scatter_(-1, ids, True)
    of_tails = compute_dense_kl(*(z.masked_fill(in_support, -1e9) for z in (teacher, student)))
    found = bucket_forward_kl(student, ids, logprobs, tail) + tail.exp() * of_tails
    torch.testing.assert_close(found, compute_dense_kl(teacher, student), rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 5, VOCAB_SIZE])
def test_bucket_kl_of_the_teacher_itself_is_zero(k: int) -> None:
    teacher = draw_logits(4, 5, seed=4)
    assert bucket_forward_kl(teacher, *take_signal(teacher, k)).abs().max() < 1e-12


def test_bucket_kl_of_free_logits_is_least_at_the_teachers_parts() -> None:
    ids, logprobs, tail = take_signal(draw_logits(1, 1, seed=5), 6)
    free = torch.zeros(1, 1, VOCAB_SIZE, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [free], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = bucket_forward_kl(free, ids, logprobs, tail).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    student = free.detach().softmax(-1)
    on_support = student.gather(-1, ids)
    torch.testing.assert_close(on_support, logprobs.exp(), rtol=0, atol=1e-6)
    torch.testing.assert_close(1 - on_support.sum(-1), tail.exp(), rtol=0, atol=1e-6)


def test_bucket_kl_with_empty_slots_equals_that_of_the_narrower_support() -> None:
    teacher, student = draw_logits(3, 4, seed=6), draw_logits(3, 4, seed=7)
    ids, logprobs, tail = take_signal(teacher, 5)
    padded_ids = torch.cat([ids, torch.zeros_like(ids)], dim=-1)
    padded_logprobs = torch.cat([logprobs, torch.full_like(logprobs, -math.inf)], dim=-1)
    gradients, values = [], []
    for signal in ((ids, logprobs, tail), (padded_ids, padded_logprobs, tail)):
        leaf = student.clone().requires_grad_()
        values.append(bucket_forward_kl(leaf, *signal))
        values[-1].sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*values)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-15)


def test_bucket_kl_of_a_position_without_signal_is_zero_with_zero_gradient() -> None:
    student = draw_logits(1, 2, seed=8).requires_grad_()
    nothing = torch.full((1, 2, 3), -math.inf, dtype=torch.float64)
    kl = bucket_forward_kl(student, torch.zeros(1, 2, 3, dtype=torch.int64), nothing, nothing[..., 0])
    kl.sum().backward()
    assert torch.equal(kl, torch.zeros_like(kl))
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_bucket_kl_of_a_student_without_tail_is_bounded_and_its_gradient_finite() -> None:
    ids, logprobs, tail = take_signal(draw_logits(1, 1, seed=9), 4)
    student = torch.full((1, 1, VOCAB_SIZE), -500.0, dtype=torch.float64)
    student = student.scatter(-1, ids, logprobs).requires_grad_()
    kl = bucket_forward_kl(student, ids, logprobs, tail)
    kl.sum().backward()
    assert kl.item() < tail.exp().item() * (tail.item() - TAIL_LOGPROB_FLOOR)
    assert torch.isfinite(student.grad).all()


def test_bucket_kl_gradient_passes_gradcheck() -> None:
    signal = take_signal(draw_logits(2, 2, seed=10), 4)
    student = draw_logits(2, 2, seed=11, scale=1.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: bucket_forward_kl(logits, *signal), (student,))


def test_bucket_kl_of_bfloat16_logits_is_reduced_in_float32() -> None:
    teacher = draw_logits(4, 5, seed=12)
    student = draw_logits(4, 5, seed=13).bfloat16()
    ids, logprobs, tail = take_signal(teacher, 6)
    expected = bucket_forward_kl(student.double(), ids, logprobs, tail)
    found = bucket_forward_kl(student, ids, logprobs.float(), tail.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_bucket_overlap_is_one_for_the_teacher_and_bounds_the_dense_sum_for_others() -> None:
    teacher, student = draw_logits(4, 5, seed=14), draw_logits(4, 5, seed=15)
    signal = take_signal(teacher, 6)
    ones = torch.ones(4, 5, dtype=torch.float64)
    torch.testing.assert_close(bucket_overlap(teacher, *signal), ones, rtol=0, atol=1e-12)
    dense = torch.minimum(teacher.softmax(-1), student.softmax(-1)).sum(-1)
    assert (bucket_overlap(student, *signal) >= dense - 1e-12).all()
    torch.testing.assert_close(bucket_overlap(student, *take_signal(teacher, VOCAB_SIZE)), dense, rtol=0, atol=1e-12)


def test_cross_entropy_equals_torchs() -> None:
    student = draw_logits(4, 5, seed=16)
    next_ids = torch.arange(20).reshape(4, 5)
    expected = torch.nn.functional.cross_entropy(student.flatten(0, 1), next_ids.flatten(), reduction="none")
    torch.testing.assert_close(cross_entropy(student, next_ids).flatten(), expected, rtol=0, atol=1e-12)
