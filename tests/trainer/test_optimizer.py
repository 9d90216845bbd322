"""Schedules at their boundaries, and what each kind of optimizer does to which parameters."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

from logitstore.errors import ConfigError
from logitstore.settings import build_settings
from trainer.loss.settings import LossSettings
from trainer.optimizer import (
    Optimizers,
    build_optimizer,
    compute_distillation_weight,
    compute_learning_rate_scale,
    set_learning_rate,
)
from trainer.optimizer_config import OptimizerSettings, ScheduleSettings


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.1),
        (9, 1.0),  # the last step of the warm-up is the first at the peak
        (10, 1.0),
        (79, 1.0),
        (80, 1.0),  # the decay starts here
        (85, 0.2 + 0.8 * 0.5),  # 1 - sqrt(1/4)
        (99, 0.2 + 0.8 * (1 - 0.95**0.5)),
    ],
)
def test_wsd_scale_at_its_boundaries(step: int, expected: float) -> None:
    schedule = ScheduleSettings(kind="wsd", warmup_steps=10, decay_fraction=0.2, final_fraction=0.2)
    assert compute_learning_rate_scale(step, 100, schedule) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.1), (9, 1.0), (10, 1.0), (55, 0.6), (100, 0.2)])
def test_cosine_scale_at_its_boundaries(step: int, expected: float) -> None:
    schedule = ScheduleSettings(kind="cosine", warmup_steps=10, final_fraction=0.2)
    assert compute_learning_rate_scale(step, 100, schedule) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.25), (3, 1.0), (99, 1.0)])
def test_constant_scale_only_warms_up(step: int, expected: float) -> None:
    assert compute_learning_rate_scale(step, 100, ScheduleSettings(kind="constant", warmup_steps=4)) == expected


def test_scale_without_warmup_steps_takes_two_percent_of_the_run() -> None:
    scales = [compute_learning_rate_scale(step, 200, ScheduleSettings(kind="constant")) for step in range(5)]
    assert scales == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 6])
@pytest.mark.parametrize("decay_fraction", [0.0, 1.0])
def test_scale_of_extreme_settings_stays_above_zero(kind: str, warmup_steps: int, decay_fraction: float) -> None:
    schedule = ScheduleSettings.model_validate(
        {"kind": kind, "warmup_steps": warmup_steps, "decay_fraction": decay_fraction}
    )
    assert all(0 < compute_learning_rate_scale(step, 6, schedule) <= 1 for step in range(6))


def test_distillation_weight_of_a_text_only_run_is_zero() -> None:
    loss = LossSettings(kind="cross_entropy", weight=0.8)
    assert compute_distillation_weight(5, 10, loss, ScheduleSettings()) == 0.0


def test_distillation_weight_follows_a_wsd_shape_under_any_learning_rate() -> None:
    loss = LossSettings(weight=0.5, weight_schedule="wsd")
    schedule = ScheduleSettings(kind="cosine", warmup_steps=2, decay_fraction=0.4, final_fraction=0.3)
    weights = [compute_distillation_weight(step, 10, loss, schedule) for step in (0, 1, 5, 6, 7)]
    assert weights == pytest.approx([0.25, 0.5, 0.5, 0.5, 0.25])


def test_distillation_weight_follows_a_cosine_to_zero() -> None:
    loss = LossSettings(weight=0.5, weight_schedule="cosine")
    schedule = ScheduleSettings(kind="wsd", warmup_steps=2, final_fraction=0.3)
    weights = [compute_distillation_weight(step, 10, loss, schedule) for step in (0, 1, 2, 6, 10)]
    assert weights == pytest.approx([0.25, 0.5, 0.5, 0.25, 0.0])


def test_distillation_weight_is_constant_by_default() -> None:
    weights = {
        compute_distillation_weight(step, 10, LossSettings(weight=0.7), ScheduleSettings()) for step in range(10)
    }
    assert weights == {0.7}


def test_optimizer_decays_matrices_alone() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    optimizer = build_optimizer(module, OptimizerSettings(learning_rate=0.1, weight_decay=0.5, betas=(0.8, 0.9)))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in module.parameters()] == [0.5, 0.0, 0.0, 0.0]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}
    set_learning_rate(optimizer, 0.025)
    assert {group["lr"] for group in optimizer.param_groups} == {0.025}


class Language(torch.nn.Module):
    """A tiny language model's parameters: embedding, matrix, stack of experts, norm, head."""

    def __init__(self, *, is_tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(9, 4)
        self.body = torch.nn.Linear(4, 4)
        self.experts = torch.nn.Parameter(torch.randn(2, 4, 4))
        self.norm = torch.nn.LayerNorm(4)
        self.head = torch.nn.Linear(4, 9, bias=False)
        if is_tied:
            self.head.weight = self.embedding.weight

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head

    def compute_loss(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.body(self.embedding(ids)) @ self.experts.sum(0))
        return torch.nn.functional.cross_entropy(self.head(hidden), ids.flip(0))


def take_steps(model: Language, optimizer: Optimizers, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        model.compute_loss(torch.randint(9, (16,), generator=generator)).backward()
        optimizer.set_learning_rate(0.1 / (1 + step))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("is_tied", [False, True])
def test_muon_moves_the_matrices_of_the_body_alone(is_tied: bool) -> None:
    model = Language(is_tied=is_tied)
    settings = OptimizerSettings(kind="muon", learning_rate=0.1, adamw_learning_rate=0.01, weight_decay=0.5)
    optimizer = build_optimizer(model, settings)
    muon, adamw = optimizer
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    assert [id(p) for group in muon.param_groups for p in group["params"]] == [id(model.body.weight)]
    decayed = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert decayed.keys() == {id(p) for p in model.parameters()} - {id(model.body.weight)}
    assert [decayed[id(p)] for p in (model.embedding.weight, model.experts, model.norm.weight)] == [0.5, 0.5, 0.0]
    set_learning_rate(optimizer, 0.05)
    assert [group["lr"] for group in muon.param_groups] == [0.05]
    assert [group["lr"] for group in adamw.param_groups] == pytest.approx([0.005, 0.005])


def test_muon_steps_are_orthogonal_and_of_the_size_of_adamws() -> None:
    model = Language()
    before = model.body.weight.detach().clone()
    optimizer = build_optimizer(model, OptimizerSettings(kind="muon", learning_rate=0.01, weight_decay=0.0))
    model.compute_loss(torch.arange(9)).backward()
    optimizer.step()
    gradient, change = (
        torch.linalg.svdvals(tensor)[:3]  # the norm takes the fourth direction out
        for tensor in (model.body.weight.grad, model.body.weight.detach() - before)
    )
    assert gradient[0] / gradient[2] > 10
    # 0.2 times the root of the wider side, times a singular value that the iteration leaves between 0.6 and 1.3.
    assert all(0.6 < value / (0.01 * 0.2 * 2) < 1.3 for value in change.tolist())


def test_optimizer_without_matrices_or_without_others_has_no_empty_part() -> None:
    norms = build_optimizer(torch.nn.LayerNorm(3), OptimizerSettings(kind="muon"))
    matrix = build_optimizer(torch.nn.Linear(3, 3, bias=False), OptimizerSettings(kind="muon"))
    plain = build_optimizer(torch.nn.Linear(3, 3, bias=False), OptimizerSettings())
    for optimizer, kind in ((norms, torch.optim.AdamW), (matrix, torch.optim.Muon), (plain, torch.optim.AdamW)):
        [member] = optimizer
        assert isinstance(member, kind)
        assert all(group["params"] for group in optimizer.param_groups)


def test_parameters_that_are_not_trained_are_not_moved() -> None:
    model = Language()
    model.requires_grad_(False)
    model.body.weight.requires_grad_(True)
    for kind in ("adamw", "muon"):
        optimizer = build_optimizer(model, OptimizerSettings.model_validate({"kind": kind}))
        assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(model.body.weight)]


@pytest.mark.parametrize("kind", ["adamw", "muon", "adamw8bit"])
def test_optimizer_goes_on_from_its_state_bit_for_bit(kind: str, tmp_path: Path) -> None:
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'logitstore[adamw8bit]'")
    settings = OptimizerSettings.model_validate({"kind": kind, "learning_rate": 0.1})
    whole, half, resumed = Language(), Language(), Language()
    take_steps(whole, build_optimizer(whole, settings), 0, 6)
    first = build_optimizer(half, settings)
    take_steps(half, first, 0, 3)
    torch.save({"model": half.state_dict(), "optimizer": first.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    second = build_optimizer(resumed, settings)
    second.load_state_dict(state["optimizer"])
    take_steps(resumed, second, 3, 6)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(half.body.weight, resumed.body.weight)


def test_state_of_other_optimizers_is_refused() -> None:
    one, two = (build_optimizer(Language(), OptimizerSettings.model_validate({"kind": k})) for k in ("adamw", "muon"))
    with pytest.raises(ValueError, match="state of 2 optimizers, found that of 1"):
        two.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="state of 1 optimizers, found that of 2"):
        one.load_state_dict(two.state_dict())


def test_optimizer_of_8_bits_keeps_moments_of_8_bits() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'logitstore[adamw8bit]'")
    matrix = torch.nn.Linear(64, 64)
    optimizer = build_optimizer(matrix, OptimizerSettings(kind="adamw8bit", learning_rate=0.01, weight_decay=0.5))
    exact = copy.deepcopy(matrix)
    reference = build_optimizer(exact, OptimizerSettings(learning_rate=0.01, weight_decay=0.5))
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        for model, moved in ((matrix, optimizer), (exact, reference)):
            model(inputs).square().sum().backward()
            moved.step()
            moved.zero_grad()
    [member] = optimizer
    moments = [member.state[matrix.weight][name] for name in ("state1", "state2")]
    assert [moment.dtype for moment in moments] == [torch.uint8, torch.uint8]
    assert [moment.numel() for moment in moments] == [64 * 64, 64 * 64]
    assert member.state[matrix.bias]["state1"].dtype == torch.float32
    # Steps of 0.01 each; 8 bits move a few of them a little.
    assert (matrix.weight - exact.weight).abs().mean() < 0.001


def test_optimizer_of_8_bits_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"pip install 'logitstore\[adamw8bit\]'"):
        build_optimizer(Language(), OptimizerSettings(kind="adamw8bit"))


def test_optimizer_of_8_bits_of_parts_of_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'logitstore[adamw8bit]'")
    monkeypatch.setattr("trainer.optimizer.DTensor", torch.nn.Parameter)  # as if they were distributed
    with pytest.raises(ConfigError, match="expected whole parameters for adamw8bit"):
        build_optimizer(Language(), OptimizerSettings(kind="adamw8bit"))


def test_settings_of_muon_are_refused_beside_another_kind() -> None:
    for changes in ({"momentum": 0.9}, {"adamw_learning_rate": 1e-3, "kind": "adamw8bit"}):
        with pytest.raises(ConfigError, match="expected kind muon beside it"):
            build_settings(OptimizerSettings, changes, where="test")


def test_settings_of_plain_adamw_are_stored_as_they_were_before_there_was_a_choice() -> None:
    plain, muon = OptimizerSettings(), OptimizerSettings(kind="muon", momentum=0.9)
    assert plain.model_dump().keys() == {"learning_rate", "betas", "weight_decay", "gradient_clip"}
    for settings in (plain, muon, OptimizerSettings(kind="adamw8bit")):
        assert OptimizerSettings.model_validate(settings.model_dump()) == settings
