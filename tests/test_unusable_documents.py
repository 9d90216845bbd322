"""Documents that the teacher has no finite logits for, and what becomes of their units."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import save_model
from unit_captures import build_unit_capture

from cluster.settings import ClusterCaptureSettings
from logitstore.errors import InvalidLogitsOfSequenceError, TeacherError
from logitstore.settings import build_settings
from logitstore.store.commit import COMMITS, Outcome, list_units, read_commit
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import write_manifest
from logitstore.store.plan import read_plan
from logitstore.store.verify import verify_store
from logitstore.teacher.generation import Answer
from logitstore.teacher.head import ChunkedLogits, LogitsPart
from logitstore.teacher.huggingface import HuggingFaceTeacher
from logitstore.teacher.loading import load_teacher
from logitstore.teacher.protocol import TeacherSettings, TopKMethod
from tools.estimate import ProbeFigures
from tools.prices import read_prices
from tools.probe import PlanOptions, run_plan

TEXT = "def read(path):\n    return open(path).read()\n"


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("teacher"))


def poison_tokens(monkeypatch: pytest.MonkeyPatch, teacher_folder: Path, text: str) -> None:
    """Make logits NaN from wherever a text has been read on, to the end of its sequence."""
    poison = load_teacher(TeacherSettings(model=str(teacher_folder), device="cpu"), TopKMethod()).encode([text])[0]
    compute = ChunkedLogits.compute

    def compute_with_poison(logits: ChunkedLogits, sequences: list[torch.Tensor]) -> Iterator[LogitsPart]:
        is_bad = torch.cat([torch.isin(ids, torch.tensor(poison)).cumsum(0) > 0 for ids in sequences])[:, None]
        for part in compute(logits, sequences):
            yield LogitsPart(
                part.num_positions,
                lambda start, stop, part=part: part.compute(start, stop).masked_fill(is_bad[start:stop], torch.nan),
            )

    monkeypatch.setattr(ChunkedLogits, "compute", compute_with_poison)


def capture(folder: Path, teacher_folder: Path, texts: list[str], **changes: Any) -> LogitStore:
    """A store of one unit."""
    unit_capture = build_unit_capture(folder, teacher_folder, texts, **changes)
    assert unit_capture.capture(0).outcome is Outcome.WON
    files = StoreFiles(str(folder))
    write_manifest(files, read_plan(files).compute_fingerprint())
    return LogitStore.open(files.url)


def test_capture_of_documents_that_the_teacher_has_no_logits_for_keeps_the_others(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_tokens(monkeypatch, teacher_folder, "~")
    texts = [TEXT * 2, "a ~ b", TEXT, "~", TEXT * 3]
    store = capture(tmp_path / "store", teacher_folder, texts)
    commit = read_commit(StoreFiles(store.url), 0)
    assert [letter.reason for letter in commit.dead_letters] == ["invalid_signal"] * 2
    assert [letter.detail.split(",")[0] for letter in commit.dead_letters] == ["line 2", "line 4"]
    # What is there is what a capture of the other documents alone would be.
    clean = capture(tmp_path / "clean", teacher_folder, [texts[0], texts[2], texts[4]])
    for record, expected in zip(store, clean, strict=True):
        np.testing.assert_array_equal(record.token_ids, expected.token_ids)
        np.testing.assert_array_equal(record.signal.support_logprobs, expected.signal.support_logprobs)
    assert verify_store(StoreFiles(store.url)).is_clean


@pytest.mark.parametrize(("num_bad", "num_good"), [(2, 0), (9, 3)])
def test_capture_with_a_teacher_that_fails_at_all_or_too_many_documents_fails(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, num_bad: int, num_good: int
) -> None:
    poison_tokens(monkeypatch, teacher_folder, "~")
    with pytest.raises(TeacherError, match="expected finite logits"):
        capture(tmp_path / "store", teacher_folder, ["a ~ b"] * num_bad + [TEXT] * num_good)
    assert not list_units(StoreFiles(str(tmp_path / "store")), COMMITS)


def test_prompt_whose_answers_have_no_finite_logits_is_one_dead_letter_and_the_others_answers_stay(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are a function of their prompt's number in the unit, which is what it was."""
    changes = {"generate": {"num_answers": 2, "max_new_tokens": 6}}
    texts = [TEXT, "a ~ b", "for x"]
    whole = capture(tmp_path / "whole", teacher_folder, texts, **changes)
    poison_tokens(monkeypatch, teacher_folder, "~")
    store = capture(tmp_path / "store", teacher_folder, texts, **changes)
    commit = read_commit(StoreFiles(store.url), 0)
    assert (commit.documents, commit.recorded_documents, commit.dead_letter_counts) == (5, 4, {"invalid_signal": 1})
    assert commit.dead_letters[0].detail.startswith("line 2, ")
    expected = [record.token_ids.tolist() for i, record in enumerate(whole) if i not in (2, 3)]
    assert [record.token_ids.tolist() for record in store] == expected


def test_answers_that_nobody_waits_for_are_given_up_before_the_unit_begins_anew(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that still writes those of before has no room for others."""
    open_calls: list[int] = []
    generate = HuggingFaceTeacher.generate

    def watch(teacher: HuggingFaceTeacher, *arguments: Any) -> Iterator[Answer]:
        assert not open_calls
        open_calls.append(1)
        try:
            yield from generate(teacher, *arguments)
        finally:
            open_calls.pop()

    monkeypatch.setattr(HuggingFaceTeacher, "generate", watch)
    monkeypatch.setattr("logitstore.unit_records._POSITIONS_AT_A_TIME", 1)
    poison_tokens(monkeypatch, teacher_folder, "~")
    gc.disable()  # which would come upon them sooner or later
    try:
        store = capture(tmp_path / "store", teacher_folder, ["a ~ b", TEXT, "for x"], generate={"max_new_tokens": 6})
    finally:
        gc.enable()
    assert len(store) == 2
    assert not open_calls


def plan_with_a_bad_document(folder: Path, teacher_folder: Path, **changes: Any) -> ProbeFigures:
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a ~ b", TEXT, TEXT * 2)))
    values = {
        "store": str(folder / "store"),
        "corpus": {"files": [str(corpus)]},
        "teacher": {"model": str(teacher_folder), "device": "cpu"},
        "method": {"k": 16},
        "sequences": {"length": 64, "mode": "document"},
    }
    settings = build_settings(ClusterCaptureSettings, {**values, **changes}, where="test")
    return run_plan(settings, PlanOptions(prices=read_prices(), prices_file=folder, probe_positions=4096)).probe


def test_plan_of_a_corpus_with_a_document_without_finite_logits_goes_by_the_others(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    poison_tokens(monkeypatch, teacher_folder, "~")
    probe = plan_with_a_bad_document(tmp_path, teacher_folder)
    assert (probe.documents, probe.scored_records) == (3, 2)
    assert "goes on without a sequence of document" in caplog.text
    assert "corpus.jsonl@0'" in caplog.text


def test_plan_of_answers_goes_by_the_prompts_that_the_teacher_can_answer(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = HuggingFaceTeacher.generate

    def fail_at_tildes(teacher: HuggingFaceTeacher, prompts: list[np.ndarray], *others: Any) -> Iterator[Answer]:
        for i, prompt in enumerate(prompts):
            if "~" in teacher.decode(prompt.tolist()):
                raise InvalidLogitsOfSequenceError("test", i, 0, "NaN at id 0")
        return generate(teacher, prompts, *others)

    monkeypatch.setattr(HuggingFaceTeacher, "generate", fail_at_tildes)
    probe = plan_with_a_bad_document(tmp_path, teacher_folder, generate={"num_answers": 2, "max_new_tokens": 6})
    assert (probe.documents, probe.dead_letters, probe.scored_records) == (5, 1, 4)
