"""Settings that cannot be meant are refused, with what was found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from logitstore.errors import ConfigError
from logitstore.settings import build_settings
from trainer.config import TrainSettings, check_batch_divides

LEAST: dict[str, Any] = {
    "store": "s3://bucket/store",
    "student": {"model": "some/model"},
    "global_batch_sequences": 64,
    "steps": 100,
    "output": "runs/one",
}


def test_settings_of_the_least_keys_distil() -> None:
    settings = build_settings(TrainSettings, LEAST, where="train.yaml")
    assert (settings.loss.kind, settings.loss.weight, settings.manifest) == ("bucket_kl", 0.8, "latest")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"temperature": 2.0}}, "normalized at temperature 1"),
        ({"loss": {"weight": 1.5}}, "loss.weight"),
        ({"student": {}}, "exactly one of model and config"),
        ({"student": {"model": "m", "config": {"model_type": "llama"}}}, "exactly one of model and config"),
        ({"student": {"config": {"hidden_size": 8}}}, "model_type"),
        ({"evaluate_every": 5}, "held_out"),
        ({"schedule": {"warmup_steps": 101}}, "at most the 100 steps, found 101"),
        ({"manifest": "newest"}, "manifest"),
        ({"vocab_size": 50}, "vocab_size"),
    ],
)
def test_settings_that_cannot_be_used_name_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_settings(TrainSettings, {**LEAST, **changes}, where="train.yaml")


def test_storage_options_are_neither_shown_nor_dumped() -> None:
    settings = build_settings(TrainSettings, {**LEAST, "storage_options": {"secret": "abc"}}, where="train.yaml")
    assert settings.storage_options == {"secret": "abc"}
    assert "abc" not in repr(settings) + settings.model_dump_json()


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({}, 3, "multiple of the 3 processes, found 8"),
        ({"micro_batch_sequences": 3}, 1, "divisor of the 8 sequences"),
        ({"micro_batch_sequences": 8}, 2, "divisor of the 4 sequences"),
    ],
)
def test_batch_that_does_not_divide_is_refused(
    make_settings: Callable[..., TrainSettings], changes: dict[str, Any], world_size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_batch_divides(make_settings(**changes), world_size)


def test_batch_that_divides_is_accepted(make_settings: Callable[..., TrainSettings]) -> None:
    check_batch_divides(make_settings(micro_batch_sequences=2), 4)
