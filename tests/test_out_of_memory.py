"""Memory that runs out under the teacher: for a batch, for a document, and on the disk that a shard is assembled on."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import save_model
from unit_captures import build_unit_capture

from logitstore.errors import OutOfMemoryOfSequenceError, OutsideError, TeacherError, TeacherLostError
from logitstore.store.commit import COMMITS, list_units, read_commit
from logitstore.store.files import StoreFiles
from logitstore.teacher.head import ChunkedLogits, LogitsPart
from logitstore.teacher.huggingface import HuggingFaceTeacher
from logitstore.teacher.loading import load_teacher
from logitstore.teacher.memory_bound import MemoryBound
from logitstore.teacher.protocol import TeacherSettings, TopKMethod
from logitstore.unit_records import LeftOut, UnitCare

TEXT = "def read(path):\n    return open(path).read()\n"
TOO_MUCH = 2**62


def run_out_of_memory() -> None:
    """What torch's own allocator says to a request that no machine can meet."""
    torch.empty(TOO_MUCH, dtype=torch.uint8)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("teacher"))


def bound_memory(
    monkeypatch: pytest.MonkeyPatch, is_too_much: Callable[[list[torch.Tensor]], bool], sizes: list[int]
) -> None:
    """Let memory run out for some batches of a transformers teacher; takes note of the size of each."""
    compute = ChunkedLogits.compute

    def compute_in_bounds(logits: ChunkedLogits, sequences: list[torch.Tensor]) -> Iterator[LogitsPart]:
        sizes.append(len(sequences))
        if is_too_much(sequences):
            run_out_of_memory()
        return compute(logits, sequences)

    monkeypatch.setattr(ChunkedLogits, "compute", compute_in_bounds)


def find_marker(teacher_folder: Path, text: str) -> torch.Tensor:
    teacher = load_teacher(TeacherSettings(model=str(teacher_folder), device="cpu"), TopKMethod())
    return torch.tensor(teacher.encode([text])[0])


def test_batch_that_memory_is_too_small_for_is_scored_in_halves_with_the_same_results(
    teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TeacherSettings(model=str(teacher_folder), device="cpu", batch_tokens=512)
    teacher = load_teacher(settings, TopKMethod(k=8))
    generator = np.random.default_rng(0)
    sequences = [generator.integers(0, 290, 65).astype(np.int32) for _ in range(16)]
    expected = list(teacher.score(sequences))
    sizes: list[int] = []
    bound_memory(monkeypatch, lambda batch: len(batch) > 3, sizes)
    for found, signal in zip(teacher.score(sequences), expected, strict=True):
        np.testing.assert_array_equal(found.support_ids, signal.support_ids)
        np.testing.assert_allclose(found.support_logprobs, signal.support_logprobs, atol=1e-4)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]  # the second batch of 8 begins with what fits


def test_sequence_that_memory_is_too_small_for_alone_gets_a_second_try(
    teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_teacher(TeacherSettings(model=str(teacher_folder), device="cpu"), TopKMethod(k=8))
    sequence = np.arange(20, dtype=np.int32)
    sizes: list[int] = []
    bound_memory(monkeypatch, lambda batch: len(sizes) == 1, sizes)
    assert [signal.num_positions for signal in teacher.score([sequence])] == [19]
    bound_memory(monkeypatch, lambda batch: True, sizes)
    message = r"sequence 0: expected memory for its 19 tokens alone, found .*DefaultCPUAllocator: "
    with pytest.raises(OutOfMemoryOfSequenceError, match=message):
        list(teacher.score([sequence]))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        np.exceptions.AxisError("not this one"),
        MemoryError(),
        RuntimeError("Expected all tensors to be on the same device"),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[:10]}",
)
def test_batch_is_run_in_halves_for_lack_of_memory_and_for_nothing_else(error: Exception) -> None:
    ran: list[list[int]] = []

    def run(batch: list[int]) -> list[int]:
        ran.append(batch)
        if len(batch) > 1:
            raise error
        return batch

    bound = MemoryBound("teacher", [5] * 3, run)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "ALLOC" in str(error):
        assert bound.run([0, 1, 2]) == [0, 1, 2]
        assert ran == [[0, 1, 2], [0], [1, 2], [1], [2]]
    else:
        with pytest.raises(type(error)):
            bound.run([0, 1, 2])
        assert ran == [[0, 1, 2]]


@pytest.mark.parametrize("mode", ["pack", "document"])
def test_document_that_memory_is_too_small_for_is_a_dead_letter_and_its_unit_survives(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    marker = find_marker(teacher_folder, "~")
    capture = build_unit_capture(
        tmp_path / "store",
        teacher_folder,
        [TEXT, "a ~ b", TEXT * 2, "for x"],
        sequences={"length": 64, "mode": mode},
    )
    bound_memory(monkeypatch, lambda batch: any(bool(torch.isin(ids, marker).any()) for ids in batch), [])
    receipt = capture.capture(0)
    assert (receipt.documents, receipt.dead_letters) == (4, 1)
    [letter] = read_commit(StoreFiles(str(tmp_path / "store")), 0).dead_letters
    assert letter.reason == "out_of_memory"
    assert letter.detail.startswith("line 2, ")
    assert "expected memory for" in letter.detail


def test_sequence_without_a_single_culprit_costs_its_longest_document(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a", TEXT, "b"]
    capture = build_unit_capture(tmp_path / "store", teacher_folder, texts)
    all_together = sum(len(ids) + 1 for ids in capture._teacher.encode(texts)) - 1
    bound_memory(monkeypatch, lambda batch: any(len(ids) == all_together for ids in batch), [])
    receipt = capture.capture(0)
    assert (receipt.documents, receipt.dead_letters) == (3, 1)
    [letter] = read_commit(StoreFiles(str(tmp_path / "store")), 0).dead_letters
    assert letter.detail.startswith("line 2, ")


def test_unit_that_memory_is_too_small_for_altogether_fails(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = build_unit_capture(tmp_path / "store", teacher_folder, [TEXT, TEXT])
    bound_memory(monkeypatch, lambda batch: True, [])
    with pytest.raises(TeacherError, match="expected memory for"):
        capture.capture(0)
    assert not list_units(StoreFiles(str(tmp_path / "store")), COMMITS)


def test_prompt_that_memory_is_too_small_to_answer_is_a_dead_letter(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = find_marker(teacher_folder, "~").tolist()
    generate: dict[str, object] = {"num_answers": 2, "max_new_tokens": 6}
    capture = build_unit_capture(tmp_path / "store", teacher_folder, [TEXT, "a ~ b", "for x"], generate=generate)
    from logitstore.teacher import huggingface_generation as generation

    generate_batch = generation._generate_batch

    def generate_in_bounds(model: Any, prompts: list[np.ndarray], *rest: Any) -> np.ndarray:
        if any(np.isin(prompt, marker).any() for prompt in prompts):
            run_out_of_memory()
        return generate_batch(model, prompts, *rest)

    monkeypatch.setattr(generation, "_generate_batch", generate_in_bounds)
    receipt = capture.capture(0)
    assert (receipt.documents, receipt.dead_letters) == (5, 1)
    commit = read_commit(StoreFiles(str(tmp_path / "store")), 0)
    assert commit.dead_letter_counts == {"out_of_memory": 1}


class _Engine:
    """A teacher whose engine dies of a token, and of nothing else."""

    def __init__(self, teacher: HuggingFaceTeacher, deadly_id: int) -> None:
        self._teacher, self._deadly_id, self.asked = teacher, deadly_id, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def score(self, sequences: list[np.ndarray], draw_keys: list[int] | None = None) -> Iterator[Any]:
        self.asked.append(len(sequences))
        if any(self._deadly_id in ids for ids in sequences):
            raise TeacherLostError("engine: dead")
        return self._teacher.score(sequences, draw_keys)


def test_engine_that_dies_of_a_document_names_it_if_care_is_taken(tmp_path: Path, teacher_folder: Path) -> None:
    texts = [TEXT, "a ~ b", TEXT * 2, "for x"]
    capture = build_unit_capture(tmp_path / "store", teacher_folder, texts, sequences={"length": 12})
    deadly_id = int(find_marker(teacher_folder, "~")[0])
    engine: Any = _Engine(capture._teacher, deadly_id)  # type: ignore[arg-type]
    capture._teacher = capture._scorer._teacher = engine
    with pytest.raises(TeacherLostError) as failure:
        capture.capture(0)
    assert failure.value.document_id is None
    [num_sequences] = engine.asked
    assert num_sequences > 2
    with pytest.raises(TeacherLostError) as failure:
        capture.capture(0, care=UnitCare())
    assert failure.value.document_id is not None
    assert set(engine.asked[1:]) == {1}
    left_out = {failure.value.document_id: LeftOut(reason="engine_died", detail="dead")}
    receipt = capture.capture(0, care=UnitCare(left_out=left_out))
    assert (receipt.documents, receipt.dead_letters) == (4, 1)
    [letter] = read_commit(StoreFiles(str(tmp_path / "store")), 0).dead_letters
    assert (letter.reason, letter.detail.split(":")[0].split(",")[0]) == ("engine_died", "line 2")


def test_shard_that_the_disk_has_no_room_for_is_trouble_outside_and_leaves_nothing(
    tmp_path: Path, teacher_folder: Path
) -> None:
    capture = build_unit_capture(tmp_path / "store", teacher_folder, [TEXT * 20])
    before = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(OutsideError, match=r"expected room for a shard .* make room there, or set TMPDIR"):
            capture.capture(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.iterdir()) == before
    assert capture.capture(0).documents == 1


def test_spill_folder_that_is_gone_is_trouble_outside(tmp_path: Path, teacher_folder: Path) -> None:
    capture = build_unit_capture(tmp_path / "store", teacher_folder, [TEXT])
    capture._spill_folder = tmp_path / "gone"
    with pytest.raises(OutsideError, match="gone: expected room for a shard"):
        capture.capture(0)
