"""Building students, refusing those that do not fit, and saving them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from made_up import VOCAB_SIZE, build_identity
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from logitstore.errors import ConfigError, IncompatibleStoreError
from logitstore.store.logit_store import LogitStore
from logitstore.teacher.tokenizer import load_tokenizer
from trainer.config import StudentSettings
from trainer.student import build_student, check_student_fits, save_student

CPU = torch.device("cpu")
CONFIG: dict[str, object] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


def build_fresh(seed: int = 0, **changes: object) -> PreTrainedModel:
    settings = StudentSettings.model_validate({"config": {**CONFIG, **changes}})
    return build_student(settings, build_identity(), seed=seed, device=CPU)


def test_soft_capped_attention_of_a_student_is_computed() -> None:
    token_ids = torch.arange(8)[None] % VOCAB_SIZE
    changes = {"model_type": "gemma2", "head_dim": 8, "initializer_range": 2.0, "sliding_window": 4}
    capped, loose = (
        build_fresh(**changes, attn_logit_softcapping=cap)(input_ids=token_ids).logits for cap in (0.01, 50.0)
    )
    assert not torch.allclose(capped, loose, atol=1e-3)


def save_tokenizer(folder: Path, words: str) -> str:
    """Save a word tokenizer below a folder and return its fingerprint."""
    vocabulary = {word: i for i, word in enumerate(["<eos>", *words.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return load_tokenizer(str(folder)).fingerprint


def test_fresh_student_has_the_teachers_vocabulary_and_end_of_text() -> None:
    student = build_fresh()
    assert student.get_output_embeddings().weight.shape[0] == VOCAB_SIZE
    assert student.config.eos_token_id == build_identity().end_of_text_id
    assert next(student.parameters()).dtype == torch.float32


def test_fresh_student_weights_are_decided_by_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = build_fresh(seed=1)
    torch.manual_seed(6)
    drawn_before = torch.rand(1, generator=torch.Generator().manual_seed(6))
    second = build_fresh(seed=1)
    assert torch.equal(torch.rand(1), drawn_before)  # building one leaves the caller's generator alone
    other = build_fresh(seed=2)
    for one, two, three in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        assert one.ndim < 2 or not torch.equal(one, three)


@pytest.mark.parametrize("changes", [{"model_type": "no-such-model"}, {"hidden_size": "wide"}, {"num_layers": 3}])
def test_fresh_student_of_an_impossible_config_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"student\.config"):
        build_fresh(**changes)


def test_pretrained_student_at_a_path_that_is_not_there_is_not_asked_for_at_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"student\.model: .* found no folder '.*/none'"):
        build_student(StudentSettings(model=str(tmp_path / "none")), build_identity(), seed=0, device=CPU)


def spoil_student(folder: Path, damage: str) -> None:
    build_fresh().save_pretrained(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "other shapes":
        config.write_text(config.read_text().replace('"intermediate_size": 32', '"intermediate_size": 48'))
    else:
        body = {name: value for name, value in load_file(weights).items() if name != "lm_head.weight"}
        save_file(body, weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut short", r"found '.*': .*incomplete metadata"),
        ("other shapes", r"mlp\.down_proj\.weight \(\[16, 32\] in the file, \[16, 48\] by config\.json\)"),
        ("without a head", r"which has no weights for lm_head\.weight; transformers would make them up"),
    ],
)
def test_pretrained_student_that_is_not_whole_is_refused(tmp_path: Path, damage: str, message: str) -> None:
    spoil_student(tmp_path, damage)
    with pytest.raises(ConfigError, match=rf"student\.model: expected [^\n]*{message}"):
        build_student(StudentSettings(model=str(tmp_path)), build_identity(), seed=0, device=CPU)


def test_student_with_a_narrower_vocabulary_is_refused_with_both_numbers(taught_store: LogitStore) -> None:
    with pytest.raises(IncompatibleStoreError, match=r"student: 49 ids\n  teacher: 50 ids"):
        check_student_fits(build_fresh(vocab_size=49), taught_store)


def test_student_with_a_padded_vocabulary_fits(taught_store: LogitStore) -> None:
    check_student_fits(build_fresh(vocab_size=64), taught_store)


def test_student_that_reads_too_few_positions_is_refused_with_both_numbers(taught_store: LogitStore) -> None:
    with pytest.raises(IncompatibleStoreError, match=r"student: 11 \(max_position_embeddings\)\n  store:   12"):
        check_student_fits(build_fresh(max_position_embeddings=11), taught_store)


def test_pretrained_student_with_another_tokenizer_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    build_fresh().save_pretrained(tmp_path)
    found = save_tokenizer(tmp_path, "one two three")
    with pytest.raises(IncompatibleStoreError) as raised:
        build_student(StudentSettings(model=str(tmp_path)), build_identity(), seed=0, device=CPU)
    assert f"student: {found}\n  teacher: {'1' * 64}" in str(raised.value)


def test_pretrained_student_with_the_teachers_tokenizer_or_none_is_loaded(tmp_path: Path) -> None:
    saved = build_fresh(seed=3)
    saved.save_pretrained(tmp_path)
    settings = StudentSettings(model=str(tmp_path), dtype="bfloat16")
    without = build_student(settings, build_identity(), seed=0, device=CPU)
    teacher = build_identity(tokenizer_fingerprint=save_tokenizer(tmp_path, "one two three"))
    with_tokenizer = build_student(settings, teacher, seed=0, device=CPU)
    for one, two, three in zip(saved.parameters(), without.parameters(), with_tokenizer.parameters(), strict=True):
        assert torch.equal(one.bfloat16(), two)
        assert torch.equal(two, three)


def test_saved_student_loads_with_the_teachers_tokenizer(tmp_path: Path) -> None:
    fingerprint = save_tokenizer(tmp_path / "teacher", "one two three")
    teacher = build_identity(model=str(tmp_path / "teacher"), tokenizer_fingerprint=fingerprint)
    student, folder = build_fresh(), tmp_path / "student"
    (folder / "left from before").mkdir(parents=True)
    save_student(student, folder, teacher, StudentSettings.model_validate({"config": CONFIG}))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for one, two in zip(student.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, two)
    assert AutoTokenizer.from_pretrained(folder)("two three")["input_ids"] == [2, 3]
    assert not (folder / "left from before").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]


@pytest.mark.parametrize("words", ["one two", None])
def test_student_saved_out_of_reach_of_its_tokenizer_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, words: str | None
) -> None:
    if words is not None:
        save_tokenizer(tmp_path / "teacher", words)  # another one than the store was captured with
    teacher = build_identity(model=str(tmp_path / "teacher"))
    with caplog.at_level(logging.WARNING):
        save_student(build_fresh(), tmp_path / "student", teacher, StudentSettings.model_validate({"config": CONFIG}))
    assert "saved without a tokenizer" in caplog.text
    assert not list((tmp_path / "student").glob("tokenizer*"))
