"""The loss benchmark on a small head: what it compares are losses with right gradients, and memory is seen."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from tools.benchmark.loss import answer, build_row, measure
from tools.benchmark.loss_methods import (
    METHODS,
    Case,
    ChunkedCrossEntropy,
    draw_next_ids,
    draw_student,
    prepare_torchtune,
)

CASE = Case(vocab_size=500, hidden_size=16, positions=24, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile_rows", [24, 7])
def test_chunked_cross_entropy_has_the_gradient_of_torch(dtype: torch.dtype, tile_rows: int) -> None:
    case = Case(vocab_size=500, hidden_size=16, positions=24, dtype=dtype)
    hidden, weight = draw_student(case)
    next_ids = draw_next_ids(case)
    tile_bytes = tile_rows * 500 * dtype.itemsize
    found = ChunkedCrossEntropy.apply(hidden, weight, next_ids, tile_bytes)  # type: ignore[no-untyped-call]
    expected = torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), next_ids)
    margin = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(found, expected, **margin)
    for one, other in zip(*(torch.autograd.grad(x, [hidden, weight]) for x in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, **margin)


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith(("TRL", "Liger"))])
def test_method_runs_forward_and_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    students: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        students.append(draw_student(case))
        return students[-1]

    monkeypatch.setattr("tools.benchmark.loss_methods.draw_student", keep)
    METHODS[name](CASE)()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in students[0])


def test_torchtune_written_anew_is_the_mean_cross_entropy_of_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = draw_student(CASE)
    teacher = torch.randn(24, 500, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("tools.benchmark.loss_methods.draw_student", lambda case: (hidden, weight))
    monkeypatch.setattr("tools.benchmark.loss_methods.draw_teacher_logits", lambda case: teacher)
    prepare_torchtune(CASE)()
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t(), teacher.softmax(-1))
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.autograd.grad(expected, weight)[0], rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_measured_memory_holds_the_gradient_of_the_head() -> None:
    case = Case(vocab_size=20_000, hidden_size=256, positions=64, dtype=torch.float32)
    found = measure("ours", case)
    assert found is not None
    gradient = 20_000 * 256 * 4
    assert gradient < found.extra_bytes < 3 * gradient  # a tile, and what libraries take for themselves
    assert found.seconds > 0


def test_package_that_is_missing_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(case: Case) -> None:
        raise ModuleNotFoundError("No module named 'trl'")

    monkeypatch.setitem(METHODS, "TRL generalized JSD", prepare)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    answer(sender, "TRL generalized JSD", CASE)
    assert receiver.recv() is None
    assert build_row("TRL generalized JSD", [], []) == ["TRL generalized JSD", "not installed", *["–"] * 4]
