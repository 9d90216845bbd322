"""Runs of students with another tokenizer than the teacher's."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from checkout import ROOT
from taught_stores import CONFIG, build_model
from training_runs import read_lines, read_weights, train_until
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabularies import build_byte_level, build_reader, fill_text_store

from logitstore.errors import ConfigError, IncompatibleStoreError
from logitstore.settings import build_settings
from logitstore.store.logit_store import LogitStore
from logitstore.teacher.protocol import SampleMethod
from trainer.config import EvaluateSettings, TrainSettings
from trainer.distributed import Processes
from trainer.evaluate import evaluate_student
from trainer.loop import train
from trainer.run import prepare_run
from trainer.sweep.plan import describe_collation
from trainer.vocabularies.settings import OtherTokenizerSettings

PAGE = (ROOT / "docs/other-tokenizers.md").read_text(encoding="utf-8")
TEACHER = build_byte_level(320)
ALONE = Processes(rank=0, world_size=1, device=torch.device("cpu"))
METHODS = ("spans", "sorted_probabilities")


@pytest.fixture
def make(text_store: LogitStore, other_tokenizer: str, tmp_path: Path) -> Callable[..., TrainSettings]:
    def make_settings(**changes: object) -> TrainSettings:
        values: dict[str, object] = {
            "store": text_store.url,
            "student": {"config": {**CONFIG, "max_position_embeddings": 48}},
            "other_tokenizer": {"method": "spans", "tokenizer": other_tokenizer},
            "loss": {"weight": 0.5},
            "global_batch_sequences": 4,
            "micro_batch_sequences": 2,
            "steps": 6,
            "optimizer": {"learning_rate": 1e-2},
            "held_out": {"source": "held"},
            "log_every": 1,
            "output": str(tmp_path / "run"),
            "device": "cpu",
        }
        return build_settings(TrainSettings, {**values, **changes}, where="test")

    return make_settings


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_train_with_another_tokenizer_leaves_a_student_that_reads_with_it(
    make: Callable[..., TrainSettings], other_tokenizer: str, tmp_path: Path, method: str
) -> None:
    settings = make(other_tokenizer={"method": method, "tokenizer": other_tokenizer}, steps=12)
    report = train(settings)
    assert report.student is not None
    assert report.evaluation is not None
    evaluation = report.evaluation
    assert evaluation.bits_per_byte is not None
    assert evaluation.teacher_bits_per_byte is not None
    assert evaluation.compared_bytes is not None
    assert evaluation.span_kl is not None
    assert 0.5 < evaluation.compared_bytes < 1
    assert evaluation.bucket_kl is None
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    losses = [line["train/cross_entropy"] for line in lines if "train/cross_entropy" in line]
    assert losses[-1] < losses[0]
    assert lines[-1]["held_out/bits_per_byte"] == evaluation.bits_per_byte

    student = AutoModelForCausalLM.from_pretrained(report.student)
    loaded = AutoTokenizer.from_pretrained(report.student)
    assert loaded.get_vocab() == AutoTokenizer.from_pretrained(other_tokenizer).get_vocab()
    assert student.config.vocab_size == 330
    assert student.config.eos_token_id == loaded.eos_token_id
    values = {"store": settings.store, "student": str(report.student), "held_out": {"source": "held"}, "device": "cpu"}
    again = evaluate_student(build_settings(EvaluateSettings, values, where="test"))
    assert again.bits_per_byte == pytest.approx(evaluation.bits_per_byte, rel=1e-4)
    assert again.positions == evaluation.positions


@pytest.mark.slow
def test_train_goes_on_bit_for_bit_and_not_with_another_tokenizer(
    make: Callable[..., TrainSettings], tmp_path: Path
) -> None:
    settings = make(output=str(tmp_path / "stopped"))
    assert train_until(settings, 3).interrupted
    other = tmp_path / "other"
    build_byte_level(330).tokenizer.save_pretrained(other)
    with pytest.raises(Exception, match="student_tokenizer"):
        prepare_run(make(output=settings.output, other_tokenizer={"method": "spans", "tokenizer": str(other)}), ALONE)
    report, whole = train(settings), train(make())
    assert report.evaluation == whole.evaluation
    assert report.student is not None
    assert whole.student is not None
    weights = read_weights(whole.student)
    assert all(torch.equal(weight, weights[name]) for name, weight in read_weights(report.student).items())


def test_pretrained_student_brings_its_tokenizer(make: Callable[..., TrainSettings], tmp_path: Path) -> None:
    folder = tmp_path / "pretrained"
    build_model(seed=2, vocab_size=448, max_position_embeddings=64).save_pretrained(folder)  # padded
    build_byte_level(350).tokenizer.save_pretrained(folder)
    settings = make(student={"model": str(folder)})
    with pytest.raises(IncompatibleStoreError, match="or set other_tokenizer"):
        prepare_run(settings.model_copy(update={"other_tokenizer": None}), ALONE)
    run = prepare_run(settings.model_copy(update={"other_tokenizer": OtherTokenizerSettings(method="spans")}), ALONE)
    assert run.reader is not None
    assert run.reader.vocab_size == 350
    batch = next(run.feed)
    assert sum(len(part.teacher_span_logprobs) for part in batch.micro_batches) > 20  # type: ignore[attr-defined]
    run.close()


def test_evaluation_of_the_teacher_itself_finds_it_as_good_as_itself(text_store: LogitStore) -> None:
    from logitstore.stream.selection import select_records
    from trainer.micro_batches import MicroBatches
    from trainer.sources import read_records
    from trainer.vocabularies.evaluation import evaluate_translated

    teacher = build_model(seed=1, vocab_size=TEACHER.vocab_size, max_position_embeddings=64)
    reader = build_reader(text_store, "spans", text_store.plan.teacher.tokenizer_name)
    records, _ = select_records(text_store, None, None)
    evaluation = evaluate_translated(
        teacher,
        read_records(text_store, records, ALONE, with_documents=True),
        reader,
        micro_batches=MicroBatches(sequences=3),
        precision="float32",
        processes=ALONE,
    )
    assert evaluation.bits_per_byte == pytest.approx(evaluation.teacher_bits_per_byte, rel=1e-5)
    assert evaluation.span_kl == pytest.approx(0, abs=1e-5)
    assert evaluation.compared_bytes is not None
    assert math.isfinite(evaluation.perplexity)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"kind": "reverse_kl"}}, "expected no kind, temperature or entropy rule beside other_tokenizer"),
        ({"loss": {"temperature": 2.0}}, "expected no kind, temperature or entropy rule beside other_tokenizer"),
        ({"loss": {"min_entropy": 0.1}}, "expected no kind, temperature or entropy rule beside other_tokenizer"),
        ({"pack_sequences": True}, "pack_sequences: cannot be had beside other_tokenizer"),
        ({"document_weights": {"sources": {"train": 2.0}}}, "document_weights: cannot be had"),
        ({"further_teachers": [{"store": "x", "weight": 0.5}]}, "further_teachers: cannot be had"),
        ({"other_tokenizer": {"method": "sorted_probabilities", "temperature": 2.0}}, "with method 'spans' only"),
        ({"student": {"from_teacher": {"layers": [0]}}}, "expected a student of its own"),
    ],
)
def test_settings_that_mean_nothing_beside_another_tokenizer_are_refused(
    make: Callable[..., TrainSettings], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_store_of_drawn_supports_teaches_spans_and_nothing_sorted(
    make: Callable[..., TrainSettings], other_tokenizer: str, tmp_path: Path
) -> None:
    store = fill_text_store(tmp_path, TEACHER, method=SampleMethod(num_draws=8))
    run = prepare_run(make(store=store.url), ALONE)
    [*parts] = next(run.feed).micro_batches
    assert sum(len(part.teacher_span_logprobs) for part in parts) > 20  # type: ignore[attr-defined]
    run.close()
    other = {"method": "sorted_probabilities", "tokenizer": other_tokenizer}
    with pytest.raises(ConfigError, match=r"needs the teacher's likeliest ids, found a store of the method 'sample'"):
        prepare_run(make(store=store.url, other_tokenizer=other), ALONE)


def test_fresh_student_without_a_named_tokenizer_is_refused(make: Callable[..., TrainSettings]) -> None:
    with pytest.raises(ConfigError, match=r"other_tokenizer\.tokenizer: expected the name or folder"):
        prepare_run(make(other_tokenizer={"method": "spans"}), ALONE)


def test_tokenizer_that_is_not_the_stores_is_refused(
    make: Callable[..., TrainSettings], other_tokenizer: str, tmp_path: Path
) -> None:
    for name, error, message in (
        (other_tokenizer, IncompatibleStoreError, "is not the tokenizer that a store was captured with"),
        (str(tmp_path / "nothing"), ConfigError, r"set other_tokenizer\.teacher_tokenizer to where it lies"),
    ):
        other = {"method": "spans", "tokenizer": other_tokenizer, "teacher_tokenizer": name}
        with pytest.raises(error, match=message):
            prepare_run(make(other_tokenizer=other), ALONE)


def test_student_narrower_than_its_tokenizer_is_refused(make: Callable[..., TrainSettings]) -> None:
    with pytest.raises(IncompatibleStoreError, match="its vocabulary is narrower than its tokenizer's"):
        prepare_run(make(student={"config": {**CONFIG, "vocab_size": 100}}), ALONE)


def test_runs_of_a_sweep_share_micro_batches_only_where_the_students_are_the_same(
    make: Callable[..., TrainSettings],
) -> None:
    def describe(length: int, **changes: object) -> str:
        config = {**CONFIG, "max_position_embeddings": length}
        return describe_collation(make(student={"config": config}, **changes))

    assert describe(48) == describe(48, loss={"weight": 0.9}, seed=3)
    assert describe(48) != describe(64)  # rows are as long as the student reads
    assert describe(48, other_tokenizer=None) == describe(64, other_tokenizer=None)


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_settings_of_the_page_are_valid(block: str) -> None:
    least = {"store": "s", "student": {"model": "m"}, "global_batch_sequences": 1, "steps": 1, "output": "o"}
    assert TrainSettings.model_validate({**least, **yaml.safe_load(block)}).other_tokenizer is not None


def test_page_names_every_setting() -> None:
    for name in OtherTokenizerSettings.model_fields:
        assert re.search(rf"\b{name}\b", PAGE), name
