"""Runs commands in this process, and stores for them to look at."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up import build_identity, build_plan, build_records, build_signal, put_shard
from tiny_models import save_model
from typer.testing import CliRunner

from logitstore.corpus.documents import DeadLetter
from logitstore.records import DocumentSpan, Record, RecordAddress
from logitstore.store.commit import build_attempt, commit_unit
from logitstore.store.files import StoreFiles
from logitstore.store.manifest import write_manifest
from logitstore.store.plan import create_plan
from logitstore.teacher.tokenizer import load_tokenizer
from tools.cli import app


class Command:
    """Runs `logitstore` with arguments; remembers nothing."""

    def __call__(self, *arguments: object, exit_code: int = 0) -> tuple[str, str]:
        """What a command leaves on stdout and stderr; it has to end with the exit code."""
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="logitstore")
        if result.exc_info and result.exit_code == 1 and exit_code != 1:
            raise AssertionError(result.stderr) from result.exception
        assert result.exit_code == exit_code, result.stderr
        return result.stdout, result.stderr

    def json(self, *arguments: object, exit_code: int = 0) -> Any:
        """The one JSON document that a command prints."""
        return json.loads(self(*arguments, "--json", exit_code=exit_code)[0])


@pytest.fixture
def logitstore(monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """The command line; a terminal of 100 columns, no colours, and the environment it sets up taken back."""
    environment = dict(os.environ)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    yield Command()
    for name in os.environ.keys() - environment.keys():
        monkeypatch.delenv(name)


@pytest.fixture
def growing_store(tmp_path: Path) -> StoreFiles:
    """A store in the middle of its capture: units 0 and 1 in manifest 1, unit 2 committed since, unit 3 to do."""
    files = StoreFiles(str(tmp_path / "growing"))
    plan = create_plan(files, build_plan(4, sources=("train", "test")))
    for unit in range(3):
        commit = put_shard(files, plan, unit, build_records(20, unit=unit), build_attempt(), tmp_path)
        if unit == 1:
            letter = DeadLetter(document_id="/corpus/1.txt@17", reason="empty", detail="line 2, byte 17: blank line")
            counted = {"documents": 21, "dead_letter_counts": {"empty": 1}, "dead_letters": (letter,)}
            commit = commit.model_copy(update=counted)
        commit_unit(files, commit)
        if unit == 1:
            write_manifest(files, plan.compute_fingerprint())
    return files


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher with its tokenizer."""
    return save_model("llama", tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def text_store(tmp_path: Path, teacher_folder: Path) -> Callable[..., StoreFiles]:
    """Function that makes a store of one record, whose tokens are those of a text."""

    def build(text: str, **teacher: object) -> StoreFiles:
        tokenizer = load_tokenizer(str(teacher_folder))
        values: dict[str, object] = {
            "model": str(teacher_folder),
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "padded_vocab_size": tokenizer.vocab_size,
        }
        files = StoreFiles(str(tmp_path / "text"))
        plan = create_plan(files, build_plan(1, teacher=build_identity(**{**values, **teacher})))
        token_ids = np.array(tokenizer.encode([text])[0], dtype=np.int32)
        positions = len(token_ids) - 1
        logits = np.random.default_rng(0).normal(0, 3, (positions, plan.teacher.vocab_size))
        logits[1, token_ids[2]] = 20.0  # one token that the teacher is sure of
        record = Record(
            address=RecordAddress(unit=0, index=0),
            token_ids=token_ids,
            loss_mask=np.arange(positions) > 0,
            signal=build_signal(logits, token_ids[1:], 8),
            documents=(DocumentSpan(document_id="read.py", start=0, document_offset=5),),
        )
        commit_unit(files, put_shard(files, plan, 0, [record], build_attempt(), tmp_path))
        write_manifest(files, plan.compute_fingerprint())
        return files

    return build


def flip_byte(path: Path, offset: int) -> None:
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


@pytest.fixture
def flip() -> Callable[[Path, int], None]:
    return flip_byte
