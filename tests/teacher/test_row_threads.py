"""Parts of logits cut side by side: the same signals in the same order, and the first error."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tiny_models import save_model

from logitstore.teacher.huggingface import load_huggingface_teacher
from logitstore.teacher.protocol import HeadTailMethod, Method, SampleMethod, TeacherSettings, TopKMethod
from logitstore.teacher.row_threads import RowThreads
from logitstore.teacher.sparse_rows import Scratch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _keep_torch_threads() -> Iterator[None]:
    """Given back what is told to be there here, torch would really have it, and round other tests' sums differently."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.usefixtures("two_threads")
def test_threads_give_results_in_order_each_with_memory_of_its_own() -> None:
    both_are_in = threading.Barrier(2, timeout=60)
    seen: list[tuple[int, Scratch, bool]] = []

    def work(start: int, scratch: Scratch) -> int:
        if start < 2:
            both_are_in.wait()
        seen.append((threading.get_ident(), scratch, torch.is_inference_mode_enabled()))
        return start

    assert list(RowThreads(CPU, 4).map(work, range(50))) == list(range(50))
    assert len({ident for ident, _, _ in seen}) == len({(ident, id(scratch)) for ident, scratch, _ in seen}) == 2
    assert all(is_inference for _, _, is_inference in seen)


@pytest.mark.usefixtures("two_threads")
def test_threads_raise_the_first_error_in_order_and_work_on_afterwards() -> None:
    def fail_from_3(start: int, scratch: Scratch) -> int:
        if start >= 3:
            raise ValueError(f"part {start}")
        return start

    threads = RowThreads(CPU, 4)
    for _ in range(2):
        with pytest.raises(ValueError, match="part 3"):
            list(threads.map(fail_from_3, range(9)))
    assert list(threads.map(lambda start, scratch: start, [4, 5])) == [4, 5]


@pytest.mark.usefixtures("two_threads")
def test_threads_are_done_with_what_they_began_when_the_error_of_another_comes_out() -> None:
    has_begun, never = threading.Event(), threading.Event()
    done = []

    def work(start: int, scratch: Scratch) -> None:
        if start == 0:
            has_begun.wait(60)
            raise ValueError("part 0")
        has_begun.set()
        never.wait(0.1)  # longer than the error takes
        done.append(start)

    with pytest.raises(ValueError, match="part 0"):
        list(RowThreads(CPU, 4).map(work, range(2)))
    assert done == [1]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_teacher_whose_head_fails_has_its_own_body_back_and_scores_on(
    num_threads: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    folder = save_model("llama", tmp_path_factory.mktemp("teacher"))
    teacher = load_huggingface_teacher(TeacherSettings(model=str(folder), device="cpu"), TopKMethod(k=8))
    sequences = [np.arange(length) * 7 % 280 for length in (40, 9, 77)]
    [expected, *_] = teacher.score(sequences)

    def fail(*arguments: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("logitstore.teacher.huggingface.sparsify", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            list(teacher.score(sequences))
    assert "forward" not in vars(teacher._model.base_model)
    [found, *_] = teacher.score(sequences)
    np.testing.assert_array_equal(found.support_logprobs, expected.support_logprobs)


def test_threads_that_begin_after_the_work_have_as_many_threads_of_torch_as_before() -> None:
    code = """
import threading, torch
from logitstore.teacher.row_threads import RowThreads
torch.set_num_threads(4)
threads = RowThreads(torch.device("cpu"), 4)
assert list(threads.map(lambda start, scratch: torch.get_num_threads(), range(9))) == [1] * 9
counts = []
later = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
later.start()
later.join()
assert (torch.get_num_threads(), counts) == (4, [4])
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("method", [TopKMethod(k=8), SampleMethod(num_draws=5), HeadTailMethod(threshold=0.1)])
def test_teacher_with_two_threads_says_what_it_says_with_one(
    method: Method, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model("llama", tmp_path_factory.mktemp("teacher"))
    monkeypatch.setattr("logitstore.teacher.huggingface.NUM_LOGITS_AT_ONCE", 2000)
    sequences = [np.arange(length) * 7 % 280 for length in (40, 9, 77)]
    signals = []
    for num_threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda num_threads=num_threads: num_threads)
        teacher = load_huggingface_teacher(TeacherSettings(model=str(folder), device="cpu"), method)
        signals.append(list(teacher.score(sequences, [1, 2, 3])))
    for one, two in zip(*signals, strict=True):
        for name in ("support_counts", "support_ids"):
            np.testing.assert_array_equal(getattr(two, name), getattr(one, name), err_msg=name)
        for name in ("support_logprobs", "tail_logprob", "entropy"):  # products of another shape may round differently
            np.testing.assert_allclose(getattr(two, name), getattr(one, name), atol=1e-5, err_msg=name)
