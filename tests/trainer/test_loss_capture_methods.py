"""What the losses make of a capture method's supports: constants of a known teacher, bias, fixed points."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from loss_cases import Case, build_case, compute_form, draw_logits, find_fixed_point, spread_gradient

from trainer.loss.settings import LossSettings


def build_zipf(vocab_size: int) -> torch.Tensor:
    weights = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    return weights / weights.sum()


def test_constants_of_a_zipf_teacher() -> None:
    """Zipf(1) over 100,000 ids with 20 kept: how far the biased losses pull the likeliest token up."""
    p, k = build_zipf(100_000), 20
    case = build_case(torch.zeros(1, len(p), dtype=torch.float64), p.log().unsqueeze(0), torch.tensor([k]), slots=k)
    assert p[0].item() == pytest.approx(0.08271, abs=5e-6)
    mass = case.support_logprobs.exp().sum().item()
    assert mass == pytest.approx(0.29758, abs=5e-6)
    # Where a loss wants q: for cross-entropies, the target is what the gradient pulls towards, q - dL/dz.
    at_zero = case.student_logits.softmax(-1)
    target = at_zero - spread_gradient(compute_form(LossSettings(kind="renormalized_kl"), case), case)
    assert target[0, 0].item() == pytest.approx(0.27795, abs=5e-6)
    assert target[0, 1].item() == pytest.approx(0.13898, abs=5e-6)
    # The residual falls on id 0 as often as the text goes on with it, that is with probability p_0.
    forms = [replace(case, next_ids=torch.tensor([y])) for y in (0, len(p) - 1)]
    on_first, elsewhere = (
        (at_zero - spread_gradient(compute_form(LossSettings(kind="residual"), form), form))[0, 0].item()
        for form in forms
    )
    assert p[0].item() * on_first + (1 - p[0].item()) * elsewhere == pytest.approx(0.14081, abs=5e-6)


def draw_sampled_case(probs: torch.Tensor, draws: int, positions: int, student: torch.Tensor, *, seed: int) -> Case:
    """Supports of as many draws from one distribution at every position, with counts over draws as weights."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(probs, draws * positions, replacement=True, generator=generator).view(positions, draws)
    counts = torch.zeros(positions, len(probs), dtype=torch.float64).scatter_add(
        -1, drawn, torch.ones(positions, draws, dtype=torch.float64)
    )
    slots = int((counts > 0).sum(-1).max())
    kept, ids = counts.topk(slots)
    log_p = torch.where(kept > 0, probs.log()[ids], -math.inf)
    return Case(
        student_logits=student.expand(positions, -1),
        teacher_logits=probs.log().expand(positions, -1),
        next_ids=drawn[:, 0],
        support_ids=ids,
        support_logprobs=log_p,
        tail_logprob=torch.zeros(positions, dtype=torch.float64),
        support_weights=kept / draws,
    )


def test_number_of_distinct_ids_of_draws_is_as_computed() -> None:
    p, draws, positions = build_zipf(100_000), 50, 400
    expected = (1 - (1 - p) ** draws).sum().item()
    assert expected == pytest.approx(43.03, abs=0.005)
    generator = torch.Generator().manual_seed(90)
    drawn = torch.multinomial(p, draws * positions, replacement=True, generator=generator).view(positions, draws)
    found = sum(len(row.unique()) for row in drawn) / positions
    # The number has a standard deviation of about 2.3, its mean over 400 positions one of 0.12.
    assert found == pytest.approx(expected, abs=0.4)


def test_fixed_point_of_sampled_targets_tends_to_the_teacher() -> None:
    probs = draw_logits(1, 12, seed=91, scale=1.0).softmax(-1)[0]
    case = draw_sampled_case(probs, 50, 4000, torch.zeros(1, 12, dtype=torch.float64), seed=92)
    student = find_fixed_point(LossSettings(kind="weighted_cross_entropy"), case)
    # 200,000 draws: a share of p has a standard deviation of sqrt(p (1 - p) / 200,000), at most 0.0011.
    torch.testing.assert_close(student, probs, rtol=0, atol=0.005)


def draw_head_tail_case(probs: torch.Tensor, threshold: float, positions: int, *, seed: int) -> Case:
    """Ids from the threshold up with their probability, systematic draws of the others with a common weight."""
    head = probs >= threshold
    while True:
        tail_probs = torch.where(head, 0.0, probs)
        tail_mass = tail_probs.sum()
        draws = math.ceil(tail_mass.item() / threshold)
        if tail_probs.max() <= tail_mass / draws:
            break
        head = head | (probs > tail_mass / draws)
    steps = (tail_probs * draws / tail_mass).cumsum(-1)
    offsets = torch.rand(positions, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    drawn = torch.searchsorted(steps, offsets + torch.arange(draws), right=True).clamp(max=len(probs) - 1)
    ids = torch.cat([head.nonzero().T.expand(positions, -1), drawn], dim=-1)
    weights = torch.cat([probs[head].expand(positions, -1), (tail_mass / draws).expand(positions, draws)], dim=-1)
    return Case(
        student_logits=torch.zeros(positions, len(probs), dtype=torch.float64),
        teacher_logits=probs.log().expand(positions, -1),
        next_ids=drawn[:, 0],
        support_ids=ids,
        support_logprobs=probs.log()[ids],
        tail_logprob=torch.zeros(positions, dtype=torch.float64),
        support_weights=weights,
    )


def test_fixed_point_of_head_and_tail_targets_tends_to_the_teacher() -> None:
    probs = draw_logits(1, 40, seed=95, scale=1.0).softmax(-1)[0]
    case = draw_head_tail_case(probs, 1 / 25, 2_500, seed=96)
    torch.testing.assert_close(case.support_weights.sum(-1), torch.ones(2_500, dtype=torch.float64))
    student = find_fixed_point(LossSettings(kind="weighted_cross_entropy"), case)
    # A tail id is drawn or not with a weight below 1/25: at most 1/50 of standard deviation over sqrt(2,500).
    torch.testing.assert_close(student, probs, rtol=0, atol=1.6e-3)


def measure_angle(one: torch.Tensor, other: torch.Tensor) -> float:
    """Degrees between two vectors."""
    cosine = torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0)
    return math.degrees(math.acos(min(1.0, cosine.item())))


def test_angle_to_the_full_gradient_falls_with_positions_for_sampled_targets_and_stays_for_top_k() -> None:
    vocab_size, k = 2000, 12
    probs = build_zipf(vocab_size)
    student = draw_logits(1, vocab_size, seed=93, scale=0.5)
    full = student.softmax(-1)[0] - probs
    sampled = []
    for positions in (64, 1024):
        case = draw_sampled_case(probs, 50, positions, student, seed=94)
        gradient = spread_gradient(compute_form(LossSettings(kind="weighted_cross_entropy"), case), case)
        sampled.append(measure_angle(gradient.mean(0), full))
    # As 1 / sqrt(positions): sixteen times as many positions, a quarter of the angle.
    assert sampled[1] == pytest.approx(sampled[0] / 4, rel=0.25)

    top = build_case(student, probs.log().unsqueeze(0), torch.tensor([k]), slots=k)
    angles = {
        kind: measure_angle(spread_gradient(compute_form(LossSettings(kind=kind), top), top)[0], full)
        for kind in ("renormalized_kl", "bucket_kl")
    }
    assert angles["renormalized_kl"] > angles["bucket_kl"] > sampled[1]
