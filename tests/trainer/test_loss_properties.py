"""What is true of the losses as mathematics: bounds, identities, fixed points, constants, orderings."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from loss_cases import (
    LOSSES,
    Case,
    build_case,
    compute_definition,
    compute_form,
    draw_case,
    draw_dense_case,
    draw_logits,
    find_fixed_point,
    name_loss,
    spread_gradient,
)

from trainer.loss.settings import LossKind, LossSettings

DIVERGENCES: tuple[LossKind, ...] = ("bucket_kl", "reverse_kl", "jensen_shannon", "skew_kl", "total_variation")
every_divergence = pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.kind in DIVERGENCES], ids=name_loss)


def compute_dense(loss: LossSettings, case: Case) -> torch.Tensor:
    """[N] the loss over the whole vocabulary in textbook form, without any notion of a support."""
    log_p, log_q = case.teacher_logits.log_softmax(-1), case.student_logits.log_softmax(-1)
    p, q, T, beta, alpha = log_p.exp(), log_q.exp(), loss.temperature, loss.beta, loss.alpha
    if loss.kind == "cross_entropy":
        return -log_q.gather(-1, case.next_ids.unsqueeze(-1)).squeeze(-1)
    if loss.kind == "weighted_cross_entropy":
        weights = torch.zeros_like(q).scatter(-1, case.support_ids, case.support_weights)
        return -(weights * log_q).sum(-1)
    if loss.kind == "residual":
        return -(p * log_q).sum(-1)
    if loss.kind == "decoupled":
        tempered_p, tempered_q = ((x / T).log_softmax(-1) for x in (case.teacher_logits, case.student_logits))
        return T**2 * (tempered_p.exp() * (tempered_p - tempered_q)).sum(-1)
    if loss.kind == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1)
    if loss.kind == "jensen_shannon":
        m = (beta * p + (1 - beta) * q).log()
        return (beta * p * (log_p - m) + (1 - beta) * q * (log_q - m)).sum(-1)
    if loss.kind == "skew_kl":
        return (p * (log_p - (alpha * p + (1 - alpha) * q).log())).sum(-1)
    if loss.kind == "total_variation":
        return (p - q).abs().sum(-1) / 2
    return (p * (log_p - log_q)).sum(-1)  # bucket_kl, top_k_kl, renormalized_kl


@pytest.mark.parametrize("loss", LOSSES, ids=name_loss)
def test_loss_of_the_whole_vocabulary_as_support_is_the_dense_one(loss: LossSettings) -> None:
    case = draw_dense_case(seed=0)
    logits = case.student_logits.clone().requires_grad_()
    dense = compute_dense(loss, case.with_student(logits))
    dense.sum().backward()
    form = compute_form(loss, case)
    torch.testing.assert_close(compute_definition(loss, case), dense.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(form.value, dense.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(spread_gradient(form, case), logits.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("loss", LOSSES, ids=name_loss)
def test_loss_of_a_student_that_is_the_teacher_is_zero_or_what_the_teacher_has(loss: LossSettings) -> None:
    case = draw_case(seed=10)
    case = case.with_student(case.teacher_logits)
    log_p = case.teacher_logits.log_softmax(-1)
    slot_p, tail_mass = case.support_logprobs.exp(), case.tail_logprob.exp()
    support_mass = slot_p.sum(-1)
    text = -log_p.gather(-1, case.next_ids.unsqueeze(-1)).squeeze(-1)
    of_support = -torch.where(case.is_filled, slot_p * case.support_logprobs, 0.0).sum(-1)
    expected = {
        "cross_entropy": text,
        "weighted_cross_entropy": -(case.support_weights * log_p.gather(-1, case.support_ids)).sum(-1),
        "residual": of_support + tail_mass * text,
        # p / P against p: what renormalizing adds, whatever the student does.
        "renormalized_kl": torch.where(support_mass > 0, -support_mass.clamp(min=1e-300).log(), 0.0),
    }
    form = compute_form(loss, case)
    nothing = torch.zeros_like(form.value)
    torch.testing.assert_close(form.value, expected.get(loss.kind, nothing), rtol=0, atol=1e-10)
    # Total variation has a kink here, at which rounding decides between its slopes.
    if loss.kind in ("bucket_kl", "reverse_kl", "jensen_shannon", "skew_kl", "decoupled"):
        gradient = spread_gradient(form, case)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-10)


def test_weighted_cross_entropy_of_the_teachers_probabilities_is_its_entropy_where_student_is_teacher() -> None:
    case = draw_dense_case(seed=20, student_is_teacher=True)
    case = replace(case, support_weights=case.support_logprobs.exp())
    entropy = torch.distributions.Categorical(logits=case.teacher_logits).entropy()
    value = compute_form(LossSettings(kind="weighted_cross_entropy"), case).value
    torch.testing.assert_close(value, entropy, rtol=0, atol=1e-12)


@every_divergence
def test_divergence_of_the_parts_is_a_lower_bound_that_rises_with_the_support(loss: LossSettings) -> None:
    student, teacher = (draw_logits(50, 30, seed=seed) for seed in (30, 31))
    values = [
        compute_form(loss, build_case(student, teacher, torch.full((50,), k), slots=k)).value
        for k in (1, 2, 4, 8, 16, 29, 30)
    ]
    for narrower, wider in itertools.pairwise(values):
        assert (wider >= narrower - 1e-12).all()
    assert (values[0] >= -1e-12).all()


def test_dense_kl_is_the_bucket_kl_and_the_tails_own() -> None:
    case = draw_case(seed=40)
    log_p, log_q = case.teacher_logits.log_softmax(-1), case.student_logits.log_softmax(-1)
    inside = torch.zeros_like(log_p).scatter_add(-1, case.support_ids, case.is_filled.double()) > 0
    tail_p, tail_q = (x.masked_fill(inside, -math.inf).log_softmax(-1) for x in (log_p, log_q))
    of_tails = torch.where(inside, 0.0, tail_p.exp() * (tail_p - tail_q)).nansum(-1)
    dense = (log_p.exp() * (log_p - log_q)).sum(-1)
    bucket = compute_form(LossSettings(), case).value
    torch.testing.assert_close(bucket + case.tail_logprob.exp() * of_tails, dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "other"),
    [
        (LossSettings(kind="decoupled"), LossSettings(kind="bucket_kl")),
        (LossSettings(kind="skew_kl", alpha=0.0), LossSettings(kind="bucket_kl")),
    ],
    ids=["decoupled at T = 1", "skew KL at alpha = 0"],
)
def test_loss_at_its_limit_is_the_bucket_kl(loss: LossSettings, other: LossSettings) -> None:
    case = draw_case(seed=50)
    one, two = compute_form(loss, case), compute_form(other, case)
    for name in ("value", "A", "B", "on_support"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("beta", "kind"), [(1e-6, "bucket_kl"), (1 - 1e-6, "reverse_kl")])
def test_jensen_shannon_over_its_small_share_tends_to_a_kl(beta: float, kind: LossKind) -> None:
    case = draw_case(seed=60, scale=1.0)
    found = compute_form(LossSettings(kind="jensen_shannon", beta=beta), case).value / min(beta, 1 - beta)
    torch.testing.assert_close(found, compute_form(LossSettings(kind=kind), case).value, rtol=1e-3, atol=1e-4)


def test_renormalized_loss_is_the_top_k_loss_over_the_supports_mass_and_a_constant() -> None:
    """Same gradient but for a factor per position: the same minimum."""
    case = draw_case(seed=70)
    mass = case.support_logprobs.exp().sum(-1)
    has_support = mass > 0
    plain, scaled = (compute_form(LossSettings(kind=kind), case) for kind in ("top_k_kl", "renormalized_kl"))
    torch.testing.assert_close((scaled.A * mass)[has_support], plain.A[has_support], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        (scaled.value * mass - plain.value)[has_support], (-mass * mass.log())[has_support], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("kind", ["top_k_kl", "renormalized_kl"])
def test_fixed_point_of_losses_without_tail_is_the_scaled_support(kind: LossKind) -> None:
    case = build_case(torch.zeros(1, 30), draw_logits(1, 30, seed=80), torch.tensor([6]), slots=6)
    student = find_fixed_point(LossSettings(kind=kind), case)
    expected = case.support_logprobs[0].softmax(-1)
    torch.testing.assert_close(student[case.support_ids[0]], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["bucket_kl", "decoupled", "reverse_kl", "jensen_shannon", "skew_kl"])
def test_fixed_point_of_losses_with_tail_is_the_teachers_partition(kind: LossKind) -> None:
    case = build_case(torch.zeros(1, 30), draw_logits(1, 30, seed=81, scale=1.0), torch.tensor([6]), slots=6)
    student = find_fixed_point(LossSettings(kind=kind), case)
    torch.testing.assert_close(student[case.support_ids[0]], case.support_logprobs[0].exp(), rtol=0, atol=1e-6)


def test_fixed_point_of_decoupled_does_not_depend_on_the_temperature() -> None:
    case = build_case(torch.zeros(1, 30), draw_logits(1, 30, seed=82, scale=1.0), torch.tensor([6]), slots=6)
    student = find_fixed_point(LossSettings(kind="decoupled", temperature=3.0), case)
    torch.testing.assert_close(student[case.support_ids[0]], case.support_logprobs[0].exp(), rtol=0, atol=1e-6)
