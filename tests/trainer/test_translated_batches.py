"""Records of which a student with another tokenizer can read nothing, and what a run says of its text."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from made_up import build_signal
from taught_stores import CONFIG, build_model
from training_runs import read_global_batches, read_lines, run_processes
from vocabularies import build_byte_level, build_sentence_piece, build_text_records, fill_text_store

from logitstore.errors import ConfigError
from logitstore.records import DocumentSpan, Record, RecordAddress, RecordBatch
from logitstore.settings import build_settings
from logitstore.store.logit_store import LogitStore
from trainer.config import TrainSettings
from trainer.distributed import Processes
from trainer.evaluation import Evaluation
from trainer.loop import train
from trainer.loss.settings import LossSettings
from trainer.micro_batches import MicroBatches
from trainer.run import prepare_run
from trainer.vocabularies.evaluation import evaluate_translated
from trainer.vocabularies.settings import OtherTokenizerSettings
from trainer.vocabularies.student_reader import StudentReader
from trainer.vocabularies.taught_student import TranslatedStudent

TEACHER = build_byte_level(320)
ALONE = Processes(rank=0, world_size=1, device=torch.device("cpu"))
METHODS = ("spans", "sorted_probabilities")


def build_unreadable_record(unit: int, index: int) -> Record:
    """A record of bytes that are no UTF-8."""
    byte_0x80 = TEACHER.tokenizer.convert_tokens_to_ids("Ģ")  # as byte-level BPE writes it
    token_ids = np.full(9, byte_0x80, dtype=np.int32)
    logits = np.random.default_rng([3, unit]).normal(size=(8, TEACHER.vocab_size))
    return Record(
        address=RecordAddress(unit=unit, index=index),
        token_ids=token_ids,
        loss_mask=np.ones(8, dtype=bool),
        signal=build_signal(logits, token_ids[1:], 8),
        documents=(DocumentSpan(document_id=f"{unit}.bytes", start=0, document_offset=0),),
    )


def build_records(*arguments: Any, unit: int, **options: Any) -> list[Record]:
    records = build_text_records(*arguments, unit=unit, **options)
    return [*records, build_unreadable_record(unit, len(records))]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LogitStore:
    """Of text, but for the last record of every unit."""
    with mock.patch("vocabularies.build_text_records", build_records):
        return fill_text_store(tmp_path_factory.mktemp("text"), TEACHER)


@pytest.fixture(scope="module")
def records() -> RecordBatch:
    """Those of a unit of it."""
    teacher = build_model(seed=1, vocab_size=TEACHER.vocab_size, max_position_embeddings=64)
    return RecordBatch.from_records(build_records(TEACHER, teacher, unit=0))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_sentence_piece(330).tokenizer.save_pretrained(folder)
    return str(folder)


def build_reader(store: LogitStore, method: str, tokenizer: str) -> StudentReader:
    return StudentReader(OtherTokenizerSettings(method=method, tokenizer=tokenizer), [store], student_model=None)


def build_taught(reader: StudentReader, method: str) -> TranslatedStudent:
    return TranslatedStudent(
        build_model(seed=3, vocab_size=reader.vocab_size, max_position_embeddings=128),
        LossSettings(),
        OtherTokenizerSettings(method=method),
        vocab_size=reader.vocab_size,
        precision="float32",
    )


@pytest.mark.parametrize("method", METHODS)
def test_micro_batch_of_nothing_the_student_reads_teaches_it_nothing(
    store: LogitStore, records: RecordBatch, tokenizer: str, method: str
) -> None:
    reader = build_reader(store, method, tokenizer)
    taught = build_taught(reader, method)
    nothing = reader.collate(records.slice(len(records) - 1, len(records)))
    assert nothing.input_ids.shape == (1, 1)
    assert not nothing.loss_mask.any()
    assert nothing.attention_mask.all()  # of a row that attends to nothing some models make NaN
    loss = taught(nothing, 0.7)
    loss.total.backward()
    for name in ("total", "distillation", "bucket_kl", "cross_entropy"):
        assert getattr(loss, name).item() == 0
    gradients = [parameter.grad for parameter in taught.parameters() if parameter.requires_grad]
    assert gradients
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_evaluation_passes_over_what_the_student_cannot_read(
    store: LogitStore, records: RecordBatch, tokenizer: str
) -> None:
    reader = build_reader(store, "spans", tokenizer)
    student = build_taught(reader, "spans").student
    last = len(records) - 1

    def find(start: int, stop: int) -> Evaluation:
        return evaluate_translated(
            student,
            [records.slice(start, stop)],
            reader,
            micro_batches=MicroBatches(sequences=1),
            precision="float32",
            processes=ALONE,
        )

    assert find(0, last + 1).span_kl == find(0, last).span_kl
    with pytest.raises(ConfigError, match="expected records with text that teacher and student both predict"):
        find(last, last + 1)


@pytest.fixture
def make(store: LogitStore, tokenizer: str, tmp_path: Path) -> Callable[..., TrainSettings]:
    def make_settings(**changes: object) -> TrainSettings:
        values: dict[str, object] = {
            "store": store.url,
            "student": {"config": {**CONFIG, "max_position_embeddings": 48}},
            "other_tokenizer": {"method": "spans", "tokenizer": tokenizer},
            "global_batch_sequences": 2,
            "micro_batch_sequences": 1,
            "steps": 10,
            "log_every": 1,
            "log_records": True,
            "output": str(tmp_path / "run"),
            "device": "cpu",
        }
        return build_settings(TrainSettings, {**values, **changes}, where="test")

    return make_settings


@pytest.mark.slow
def test_rank_with_nothing_to_read_keeps_in_step_with_another(
    make: Callable[..., TrainSettings], store: LogitStore, tmp_path: Path
) -> None:
    whole, ranks = make(), make(output=str(tmp_path / "ranks"))
    train(whole)
    run_processes(ranks, tmp_path, 2)
    last = {record.address.unit: str(record.address) for record in store}  # the last of a unit stays
    batches = read_global_batches(Path(ranks.output))
    assert any(len({*last.values()}.intersection(batch)) == 1 for batch in batches.values())
    found, expected = (read_lines(Path(settings.output) / "metrics.jsonl") for settings in (ranks, whole))
    for name in ("train/loss", "train/bucket_kl", "train/cross_entropy"):
        assert [line[name] for line in found] == pytest.approx([line[name] for line in expected], rel=1e-4)


def test_run_says_once_and_on_rank_0_what_of_its_text_was_in_spans(
    make: Callable[..., TrainSettings], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for rank in range(2):
        run = prepare_run(make(), ALONE)
        run.processes = replace(ALONE, rank=rank, world_size=2)
        for micro_batch in next(run.feed).micro_batches:
            run.model(micro_batch, 0.5)
        run.close()
        run.close()
    [line] = [message for message in caplog.messages if "% of" in message]
    assert re.match(r"other_tokenizer: \d+\.\d% of \d+ bytes of text on rank 0 were in \d+ spans", line)
