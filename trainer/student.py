"""The student: built for a store, checked against its teacher, saved as a folder that transformers loads."""

from __future__ import annotations

import logging
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from logitstore.errors import ConfigError, IncompatibleStoreError
from logitstore.store.logit_store import LogitStore
from logitstore.teacher.attention import choose_attention
from logitstore.teacher.protocol import TeacherIdentity
from logitstore.teacher.tokenizer import load_tokenizer
from trainer.config import StudentSettings
from trainer.lora import add_lora, has_lora, merge_lora, save_adapter
from trainer.pretrained import load_pretrained
from trainer.teacher_cut import cut_student
from trainer.writing import writing

_LOGGER = logging.getLogger(__name__)
ADAPTER = "adapter"  # folder below a student's
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What a folder holds that a tokenizer can be loaded from; a student's folder may come without one.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
# Keys that every transformers config takes without having a field of that name.
_CONFIG_KEYS = frozenset({"model_type", "attn_implementation", "rope_theta", "rope_scaling"})


def build_student(
    settings: StudentSettings, teacher: TeacherIdentity, *, seed: int, device: torch.device
) -> PreTrainedModel:
    """Load the pretrained student, cut it from its teacher, or make one with fresh weights that the seed decides.

    Returns:
        The student, with adapters where the settings ask for them; what is to be trained of it requires a gradient.

    Raises:
        ConfigError: transformers cannot load or build it, weights of it are missing, the teacher cannot be cut so, or
            peft finds no place for adapters.
        IncompatibleStoreError: it comes with another tokenizer than the teacher's.
    """
    dtype = _DTYPES[settings.dtype]
    if settings.model is not None:
        student = load_pretrained(settings.model, dtype, "student.model")
        _check_tokenizer(settings.model, teacher)
    elif settings.from_teacher is not None:
        name = settings.from_teacher.model or teacher.model
        student = cut_student(load_pretrained(name, dtype, "student.from_teacher.model"), settings.from_teacher)
        _check_tokenizer(name, teacher)
    else:
        assert settings.config is not None  # checked when the settings were built
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student = _build_fresh(_complete_config(settings.config, teacher), dtype)
    choose_attention(student)
    if settings.lora is not None:
        add_lora(student, settings.lora, seed=seed)
    student.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the true signature
    return student


def _build_fresh(config: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    try:
        built = AutoConfig.for_model(**config)
        student: PreTrainedModel = AutoModelForCausalLM.from_config(built, dtype=dtype)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"student.config: cannot be built: {error}; the keys are those of transformers") from error
    known = {field.name for field in fields(built)} | built.attribute_map.keys() | _CONFIG_KEYS
    if unknown := sorted(config.keys() - known):
        raise ConfigError(
            f"student.config: expected keys of {type(built).__name__}, found {', '.join(unknown)}, which transformers "
            "would ignore"
        )
    return student


def _complete_config(config: dict[str, Any], teacher: TeacherIdentity) -> dict[str, Any]:
    """The config with the teacher's vocabulary and special tokens where it says nothing of its own."""
    end_of_text = teacher.end_of_text_id
    defaults = {"vocab_size": teacher.vocab_size, "bos_token_id": end_of_text, "eos_token_id": end_of_text}
    return {**defaults, **config}


def check_student_fits(student: PreTrainedModel, store: LogitStore) -> None:
    """Check that a student can learn from a store: vocabulary and length.

    A head that is wider than the teacher's vocabulary (padded to a rounder number) fits: what is too much is cut off.

    Raises:
        IncompatibleStoreError: the student's head is narrower than the teacher's vocabulary, or the student reads
            fewer positions than the store's sequences have; both numbers are printed.
    """
    teacher = store.plan.teacher
    head = student.get_output_embeddings()
    width = student.config.get_text_config().vocab_size if head is None else head.weight.shape[0]
    if width < teacher.vocab_size:
        raise IncompatibleStoreError(
            f"student: its vocabulary is narrower than the teacher's\n  student: {width} ids\n"
            f"  teacher: {teacher.vocab_size} ids, in {store.url}\nchoose a student with the teacher's tokenizer, or "
            "set other_tokenizer for one with its own"
        )
    length = store.plan.sequences.length
    longest = getattr(student.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and longest < length:
        raise IncompatibleStoreError(
            f"student: it reads fewer positions than the store's sequences have\n  student: {longest} "
            f"(max_position_embeddings)\n  store:   {length}, in {store.url}\nchoose or configure a longer student"
        )


def _check_tokenizer(model: str, teacher: TeacherIdentity) -> None:
    """Check that a pretrained student reads token ids as the teacher does, where it says how it reads them."""
    if Path(model).is_dir() and not any((Path(model) / name).exists() for name in TOKENIZER_FILES):
        return
    fingerprint = load_tokenizer(model).fingerprint
    if fingerprint != teacher.tokenizer_fingerprint:
        raise IncompatibleStoreError(
            f"student: {model!r} has another tokenizer than the teacher, so the same ids are other text\n"
            f"  student: {fingerprint}\n  teacher: {teacher.tokenizer_fingerprint}, {teacher.model!r}\n"
            "choose a student of the teacher's family, or set other_tokenizer, which teaches any student"
        )


def save_student(
    student: PreTrainedModel, folder: Path, teacher: TeacherIdentity, settings: StudentSettings, *, card: str = ""
) -> None:
    """Save a finished student as a folder that transformers and vLLM load, in place of an earlier one.

    Adapters are added to the weights that they stand beside; they themselves are kept in `adapter` below the folder, as
    peft loads them. The tokenizer comes from the student's or the teacher's folder; where neither is within reach any
    more, the folder is saved without one, which is logged.

    Args:
        student: all of it.
        folder: to make or replace.
        teacher: of its store.
        settings: that it was built by.
        card: text of README.md, see `model_card.py`; none is written where it is empty.

    Raises:
        OutsideError: it cannot be written.
    """
    with writing(folder):
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        if not _write_student(student, temporary, teacher, settings, card):
            _LOGGER.warning(
                "%s: saved without a tokenizer: the teacher's, %r, cannot be loaded here",
                folder,
                teacher.tokenizer_name,
            )
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)


def _write_student(
    student: PreTrainedModel, folder: Path, teacher: TeacherIdentity, settings: StudentSettings, card: str
) -> bool:
    """Fill a folder; whether a tokenizer is in it."""
    if has_lora(student):
        merge_lora(student).save_pretrained(folder)
        save_adapter(student, folder / ADAPTER)
    else:
        student.save_pretrained(folder)
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")
    origin = None if settings.from_teacher is None else settings.from_teacher.model
    sources = (settings.model, origin, teacher.tokenizer_name)
    return any(source is not None and _save_tokenizer(source, folder, teacher) for source in sources)


def _save_tokenizer(source: str, folder: Path, teacher: TeacherIdentity) -> bool:
    """Save the tokenizer of a model beside the student, if it is the one that the teacher read with."""
    try:
        fingerprint = load_tokenizer(source).fingerprint
    except ConfigError:
        return False
    if fingerprint != teacher.tokenizer_fingerprint:
        return False
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return True
