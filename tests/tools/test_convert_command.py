"""`logitstore convert`: a store out, a data set in, and a student of what came in."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import ROOT

from logitstore.interchange.rows import ForeignRow, ForeignSequence, split_row
from logitstore.store.files import StoreFiles

TextStore = Callable[..., StoreFiles]
TEXT = "def read(path):\n    with open(path) as stream:\n        return stream.read()\n" * 3


def import_arguments(folder: Path, store: Path, layout: str, teacher: Path) -> list[str]:
    options = ["--layout", layout, "--teacher", "big", "--tokenizer", str(teacher)]
    return ["convert", "import", str(folder), str(store), *options]


@pytest.mark.parametrize("layout", ["distillkit", "distillkit-compressed", "axolotl"])
def test_store_that_is_exported_and_imported_verifies_and_agrees(
    layout: str, text_store: TextStore, teacher_folder: Path, tmp_path: Path, logitstore: Any
) -> None:
    store = text_store(TEXT).url
    exported = logitstore.json("convert", "export", store, tmp_path / "out", "--layout", layout, "--check-all")
    assert (exported["records"], exported["files"], exported["files_written"]) == (1, 1, 1)
    assert exported["agreement"]["beyond_bound"] == 0
    assert exported["agreement"]["positions"] == exported["positions"]
    arguments = import_arguments(tmp_path / "out", tmp_path / "in", layout, teacher_folder)
    imported = logitstore.json(*arguments, "--check-all")
    assert (imported["documents"], imported["recorded_documents"], imported["dead_letters"]) == (1, 1, {})
    assert imported["positions"] == exported["positions"] == imported["agreement"]["positions"]
    assert imported["agreement"]["beyond_bound"] == 0
    assert imported["agreement"]["mean_kl"] < 1e-4
    assert imported["normalization"] == ("support" if layout == "axolotl" else "vocabulary")
    assert logitstore.json("verify", tmp_path / "in")["is_clean"]
    teacher = logitstore.json("inspect", tmp_path / "in")["teacher"]
    assert (teacher["model"], teacher["engine"]) == ("big", "imported")


def test_commands_of_the_page_run_one_after_the_other(
    text_store: TextStore, teacher_folder: Path, tmp_path: Path, logitstore: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = text_store(TEXT).url
    page = (ROOT / "docs/conversion.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    logitstore (.*)$", page, re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["convert", "convert", "convert", "verify"]
    for line in lines:
        line = line.replace("runs/quickstart/store", store).replace("TOKENIZER", str(teacher_folder))
        logitstore(*line.replace("--top-k 16", "--top-k 4").split())
    assert logitstore.json("inspect", "runs/imported")["teacher"]["model"] == "big"


def test_convert_tells_people_what_was_compared(
    text_store: TextStore, teacher_folder: Path, tmp_path: Path, logitstore: Any
) -> None:
    store = text_store(TEXT).url
    text, _ = logitstore("convert", "export", store, tmp_path / "out", "--layout", "distillkit")
    assert "layout distillkit, 8 entries per position" in " ".join(text.split())
    assert "logprobs off by at most 0 nats" in text
    text, _ = logitstore("convert", "export", store, tmp_path / "out", "--layout", "distillkit")
    assert "0 written now" in text
    text, _ = logitstore(*import_arguments(tmp_path / "out", tmp_path / "in", "distillkit", teacher_folder))
    assert "normalized over the vocabulary" in text
    assert "kept by every entry" in text


def test_polynomial_export_says_that_it_has_no_bound(text_store: TextStore, tmp_path: Path, logitstore: Any) -> None:
    store = text_store(TEXT).url
    vocab_size = logitstore.json("inspect", store)["teacher"]["vocab_size"]
    config = {"d": vocab_size, "k": 8, "exact_k": 2, "polynomial_terms": [0, 1], "delta_encoding": False}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--layout", "distillkit-compressed", "--compression", tmp_path / "config.yaml"]
    text, _ = logitstore("convert", "export", store, tmp_path / "out", *arguments)
    assert "none: a polynomial has no bound" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--layout", "megatron"],
            "layout: expected 'distillkit', 'distillkit-compressed' or 'axolotl', found 'megatron'",
        ),
        (["--layout", "distillkit", "--top-k", "9"], "top_k: expected 1 to 8"),
        (["--layout", "distillkit", "--manifest", "7"], "expected manifest 7, found manifests [1]"),
        (
            ["--layout", "distillkit-compressed", "--compression", "nowhere.yaml"],
            "nowhere.yaml: expected a file of settings, found none",
        ),
        ([], "expected --layout, found none"),
    ],
)
def test_export_with_wrong_arguments_ends_with_2_and_says_why(
    arguments: list[str], message: str, text_store: TextStore, tmp_path: Path, logitstore: Any
) -> None:
    store = text_store(TEXT).url
    _, stderr = logitstore("convert", "export", store, tmp_path / "out", *arguments, exit_code=2)
    assert message in " ".join(stderr.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer", "/nowhere"], "tokenizer '/nowhere': cannot be loaded"),
        (["--vocab-size", "10"], "--vocab-size: expected at least the"),
        (["--codec", "zip"], "shard.codec: expected one of 'float32', 'float16', 'compact', found 'zip'"),
        (["--layout", "axolotl"], "try --layout distillkit"),
    ],
)
def test_import_with_wrong_arguments_ends_with_2_and_says_why(
    arguments: list[str],
    message: str,
    text_store: TextStore,
    teacher_folder: Path,
    tmp_path: Path,
    logitstore: Any,
) -> None:
    logitstore("convert", "export", text_store(TEXT).url, tmp_path / "out", "--layout", "distillkit")
    command = import_arguments(tmp_path / "out", tmp_path / "in", "distillkit", teacher_folder)
    _, stderr = logitstore(*command, *arguments, exit_code=2)
    assert message in stderr
    assert not (tmp_path / "in").exists()


def test_import_without_a_tokenizer_asks_for_it(tmp_path: Path, logitstore: Any) -> None:
    command = ["convert", "import", tmp_path, tmp_path / "in", "--layout", "distillkit", "--teacher", "big"]
    _, stderr = logitstore(*command, exit_code=2)
    assert "--tokenizer" in stderr


def test_conversion_that_breaks_its_bound_ends_with_3(
    text_store: TextStore, tmp_path: Path, logitstore: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def misread(row: ForeignRow) -> list[ForeignSequence]:
        [sequence] = split_row(row)
        return [replace(sequence, logprobs=sequence.logprobs - 0.1)]

    monkeypatch.setattr("logitstore.interchange.export_check.split_row", misread)
    text, _ = logitstore(
        "convert", "export", text_store(TEXT).url, tmp_path / "out", "--layout", "distillkit", exit_code=3
    )
    assert "broken by" in text


@pytest.mark.slow
def test_imported_store_trains_a_student(
    text_store: TextStore, teacher_folder: Path, tmp_path: Path, logitstore: Any
) -> None:
    logitstore("convert", "export", text_store(TEXT).url, tmp_path / "out", "--layout", "axolotl")
    logitstore(*import_arguments(tmp_path / "out", tmp_path / "in", "axolotl", teacher_folder))
    student = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "vocab_size": 304,
    }
    settings = {
        "store": str(tmp_path / "in"),
        "student": {"config": student},
        "global_batch_sequences": 1,
        "steps": 2,
        "output": str(tmp_path / "run"),
        "device": "cpu",
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    report = logitstore.json("train", tmp_path / "train.yaml")
    assert report["steps"] == 2
