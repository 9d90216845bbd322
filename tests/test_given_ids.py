"""Corpora of token ids, with and without candidates for the teacher to score."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import save_model

from logitstore.capture import UnitCapture
from logitstore.corpus.given_ids import GivenIdsSettings, parse_given_ids
from logitstore.corpus.rejection import RejectedDocumentError
from logitstore.errors import ConfigError, TeacherError
from logitstore.planning import CaptureSettings, build_plan
from logitstore.settings import build_settings
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import write_manifest
from logitstore.store.plan import create_plan
from logitstore.store.verify import verify_store
from logitstore.teacher.huggingface import HuggingFaceTeacher
from logitstore.teacher.loading import load_teacher
from logitstore.teacher.protocol import GivenIdsMethod, TeacherSettings
from logitstore.teacher.sparsify import InvalidLogitsError, sparsify

FIELDS = GivenIdsSettings(candidates_field="candidates", taught_field="taught")
GOOD = {"token_ids": [5, 6, 7, 8], "candidates": [[], [6, 9, 9], [], [8]], "taught": [0, 1, True, False]}


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("teacher"))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    vocab_size=st.integers(4, 500),
    width=st.integers(1, 30),
    spread=st.sampled_from([0.0, 1.0, 5.0, 80.0]),
)
def test_support_of_given_ids_matches_float64(seed: int, vocab_size: int, width: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, vocab_size, generator=generator) * spread
    logits[0, 1] = -math.inf
    logits[1, 1] = torch.finfo(torch.float32).min
    candidates = torch.randint(-2, vocab_size, (6, width), generator=generator)
    candidates[5] = -1
    next_ids = torch.randint(0, vocab_size, (6,), generator=generator)
    method = GivenIdsMethod(temperatures=(2.0,))
    rows = sparsify(logits, next_ids, method, candidates_RC=candidates)
    dense = logits.double().log_softmax(-1)
    dense[1, 1] = -math.inf
    for row in range(6):
        count = int(rows.counts[row])
        ids, found = rows.ids[row, :count], rows.logprobs[row, :count].double()
        asked = {int(i) for i in candidates[row] if i >= 0 and dense[row, i] > -math.inf}
        assert len(ids) == len(asked)
        assert set(ids.tolist()) == asked
        assert (found.diff() <= 0).all()
        torch.testing.assert_close(found, dense[row, ids], rtol=1e-6, atol=2e-5)
        outside = dense[row].clone()
        outside[ids] = -math.inf
        torch.testing.assert_close(rows.tail_logprob[row].double(), outside.logsumexp(-1), rtol=1e-6, atol=2e-5)
        entropy = torch.special.entr(dense[row].exp()).sum()
        torch.testing.assert_close(rows.entropy[row].double(), entropy, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(
            rows.next_token_logprob[row].double(), dense[row, next_ids[row]], rtol=1e-6, atol=2e-5
        )


def test_invalid_logits_are_named() -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = math.nan
    with pytest.raises(InvalidLogitsError, match=r"row 1: .* NaN at id 3"):
        sparsify(logits, torch.zeros(2, dtype=torch.int64), GivenIdsMethod(), candidates_RC=torch.zeros(2, 1).long())


def test_document_of_token_ids_is_read() -> None:
    found = parse_given_ids(GOOD, FIELDS)
    assert found.token_ids.tolist() == [5, 6, 7, 8]
    assert found.is_taught.tolist() == [False, True, True, False]
    assert found.candidates is not None
    assert [ids.tolist() for ids in found.candidates] == [[], [6, 9, 9], [], [8]]


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"token_ids": None}, "missing_text", "'token_ids'"),
        ({"token_ids": []}, "empty", "no token ids"),
        ({"token_ids": [5, "6", 7, 8]}, "malformed", "list of integers under 'token_ids'"),
        ({"token_ids": [5, True, 7, 8]}, "malformed", "list of integers"),
        ({"token_ids": [5, -1, 7, 8]}, "malformed", "at least 0 under 'token_ids', found -1"),
        ({"token_ids": [5, 2**40, 7, 8]}, "malformed", "found 1099511627776"),
        ({"candidates": None}, "missing_text", "'candidates'"),
        ({"candidates": [[], [6], []]}, "malformed", "4 values, one for each token, under 'candidates', found 3"),
        ({"candidates": "no"}, "malformed", "found str"),
        ({"candidates": [[], [6], [1.5], []]}, "malformed", r"integers under 'candidates\[2\]'"),
        ({"taught": [1, 1]}, "malformed", "4 values, one for each token, under 'taught', found 2"),
        ({"taught": [1, 1, 2, 0]}, "malformed", "booleans under 'taught'"),
    ],
)
def test_document_whose_lists_do_not_line_up_is_rejected(changes: dict[str, Any], reason: str, detail: str) -> None:
    with pytest.raises(RejectedDocumentError, match=detail) as raised:
        parse_given_ids({**GOOD, **changes}, FIELDS)
    assert raised.value.reason == reason


def build(folder: Path, teacher: Path, **changes: Any) -> CaptureSettings:
    values: dict[str, Any] = {
        "store": str(folder / "store"),
        "corpus": {"files": [str(folder / "corpus.*")], "given_ids": FIELDS.model_dump()},
        "teacher": {"model": str(teacher), "device": "cpu"},
        "method": {"kind": "given_ids", "temperatures": [2.0]},
        "sequences": {"length": 6},
        "shard": {"codec": {"kind": "compact"}},
    }
    return build_settings(CaptureSettings, {**values, **changes}, where="test")


def capture(settings: CaptureSettings) -> LogitStore:
    teacher = load_teacher(settings.teacher, settings.method)
    files = StoreFiles(settings.store)
    plan = create_plan(files, build_plan(settings, teacher.identity))
    capture = UnitCapture(files, plan, teacher, settings.corpus)
    for unit in range(plan.num_units):
        capture.capture(unit)
    write_manifest(files, plan.compute_fingerprint())
    assert verify_store(files).problems == ()
    return LogitStore.open(settings.store)


def test_capture_keeps_what_can_be_used_and_counts_the_rest(tmp_path: Path, teacher_folder: Path) -> None:
    documents = [
        GOOD,
        {**GOOD, "candidates": [[], [6]]},
        {**GOOD, "token_ids": [5, 6, 7, 5000]},
        {**GOOD, "candidates": [[], [6, 5000], [], []]},
        {"token_ids": [5], "candidates": [[]], "taught": [1]},
        {"token_ids": [5] * 8, "candidates": [[]] * 8, "taught": [1] * 8},
        {**GOOD, "candidates": [[], [6], [7], [8]]},
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    store = capture(build(tmp_path, teacher_folder))
    statistics = store.compute_statistics()
    assert statistics.documents == 7
    assert statistics.dead_letters == {"malformed": 1, "token_out_of_range": 2, "too_short": 1, "too_long": 1}
    first, last = store
    assert first.token_ids.tolist() == [5, 6, 7, 8]
    assert first.loss_mask.tolist() == [True, True, False]
    assert first.signal.support_counts.tolist() == [2, 0, 1]
    assert sorted(first.signal.support_at(0)[0].tolist()) == [6, 9]
    assert first.signal.tail_logprob[1] == pytest.approx(0.0, abs=1e-5)  # of all ids, as a float32 sums them
    assert last.signal.support_ids.tolist() == [6, 7, 8]
    np.testing.assert_allclose(last.signal.support_logprobs, last.signal.next_token_logprob, atol=0.02)
    assert first.signal.temperatures == (2.0,)


def test_rows_of_parquet_are_the_same_documents(tmp_path: Path, teacher_folder: Path) -> None:
    stores = []
    for kind in ("jsonl", "parquet"):
        folder = tmp_path / kind
        folder.mkdir()
        if kind == "jsonl":
            (folder / "corpus.jsonl").write_text(json.dumps(GOOD))
        else:
            row = {**GOOD, "taught": [bool(flag) for flag in GOOD["taught"]]}
            pq.write_table(pa.Table.from_pylist([row]), folder / "corpus.parquet")
        stores.append(capture(build(folder, teacher_folder)))
    [one], [other] = stores
    for name in ("support_ids", "support_logprobs", "tail_logprob", "entropy", "next_token_logprob"):
        np.testing.assert_array_equal(getattr(one.signal, name), getattr(other.signal, name))


def test_token_ids_without_candidates_are_captured_by_any_method(tmp_path: Path, teacher_folder: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"token_ids": [5, 6, 7, 8]}))
    corpus = {"files": [str(tmp_path / "corpus.jsonl")], "given_ids": True}
    [record] = capture(build(tmp_path, teacher_folder, corpus=corpus, method={"k": 3}))
    assert record.token_ids.tolist() == [5, 6, 7, 8]
    assert record.signal.support_counts.tolist() == [3, 3, 3]


def test_batches_of_unequal_width_say_the_same_as_alone(teacher_folder: Path) -> None:
    teacher = load_teacher(TeacherSettings(model=str(teacher_folder), device="cpu"), GivenIdsMethod())
    assert isinstance(teacher, HuggingFaceTeacher)
    sequences = [np.array([5, 6, 7, 8]), np.array([9, 10])]
    candidates = [np.array([[6, -1], [7, 20], [8, 8]]), np.array([[10, 11, 12]])]
    together = list(teacher.score_given(sequences, candidates))
    for i, signal in enumerate(together):
        [alone] = teacher.score_given(sequences[i : i + 1], candidates[i : i + 1])
        np.testing.assert_array_equal(signal.support_ids, alone.support_ids)
        np.testing.assert_allclose(signal.support_logprobs, alone.support_logprobs, atol=1e-5)
    assert [signal.support_counts.tolist() for signal in together] == [[1, 2, 1], [3]]
    with pytest.raises(ConfigError, match="expected candidates"):
        teacher.score(sequences)
    with pytest.raises(ConfigError, match="expected candidates for"):
        teacher.score_given(sequences, candidates[:1])
    with pytest.raises(TeacherError, match="candidates of sequence 0"):
        teacher.score_given(sequences[:1], [np.full((3, 1), 5000)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"k": 3}}, "one without the other"),
        ({"corpus": {"files": ["x"], "given_ids": True}}, "one without the other"),
        (
            {"corpus": {"files": ["x"], "given_ids": True, "chat": True}, "method": {"k": 3}},
            "either 'chat' or 'given_ids'",
        ),
        ({"sequences": {"mode": "pack"}}, "expected sequences.mode document"),
        ({"generate": {}}, "no generate"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        build(tmp_path, tmp_path, **changes)


def test_other_engines_refuse_given_ids() -> None:
    with pytest.raises(ConfigError, match=r"expected teacher\.engine huggingface, found vllm"):
        load_teacher(TeacherSettings(model="m", engine="vllm"), GivenIdsMethod())


def test_plan_of_texts_says_nothing_of_given_ids(tmp_path: Path, teacher_folder: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"token_ids": [5, 6]}))
    teacher = load_teacher(TeacherSettings(model=str(teacher_folder), device="cpu"), GivenIdsMethod())
    plan = build_plan(build(tmp_path, teacher_folder), teacher.identity)
    assert "given_ids" in plan.model_dump_json()
    texts = plan.model_copy(update={"corpus": plan.corpus.model_copy(update={"given_ids": None})})
    assert "given_ids" not in texts.corpus.model_dump_json()
