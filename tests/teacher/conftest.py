"""Fixtures of tiny teachers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import save_model, train_tokenizer
from transformers import PreTrainedTokenizerFast

from logitstore.teacher.protocol import TeacherSettings


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """`save_model`: make_model(family, folder, seed=…, dtype=…)."""
    return save_model


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`train_tokenizer`: make_tokenizer(size)."""
    return train_tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model of a family, made once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_model(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture
def settings_for(model_folder: Callable[[str], Path]) -> Callable[..., TeacherSettings]:
    def build(family: str = "llama", **changes: object) -> TeacherSettings:
        return TeacherSettings.model_validate({"model": str(model_folder(family)), "device": "cpu", **changes})

    return build
