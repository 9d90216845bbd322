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
        ({"loss": {"kind": "residual", "temperature": 2.0}}, "expected 1 with kind 'residual', found 2; choose kind"),
        ({"loss": {"kind": "reverse_kl", "temperature": 0.5}}, "expected 1 or more with kind 'reverse_kl', found 0.5"),
        ({"loss": {"kind": "decoupled", "temperature": 0.0}}, "loss.temperature"),
        ({"loss": {"kind": "kl"}}, "loss.kind"),
        ({"loss": {"beta": 0.1}}, "beta: expected with kind 'jensen_shannon' only, found 0.1 with kind 'bucket_kl'"),
        ({"loss": {"kind": "jensen_shannon", "alpha": 0.2}}, "alpha: expected with kind 'skew_kl' only"),
        ({"loss": {"kind": "jensen_shannon", "beta": 1.0}}, "loss.beta"),
        ({"loss": {"kind": "skew_kl", "alpha": 1.0}}, "loss.alpha"),
        ({"loss": {"min_entropy": 0.0}}, "loss.min_entropy"),
        ({"loss": {"full_weight_entropy": -1.0}}, "loss.full_weight_entropy"),
        ({"loss": {"weight_schedule": "linear"}}, "loss.weight_schedule"),
        ({"loss": {"weight": 1.5}}, "loss.weight"),
        ({"student": {}}, "exactly one of model, config and from_teacher"),
        (
            {"student": {"model": "m", "config": {"model_type": "llama"}}},
            "exactly one of model, config and from_teacher",
        ),
        ({"student": {"config": {"hidden_size": 8}}}, "model_type"),
        ({"micro_batch_sequences": 2, "micro_batch_tokens": 100}, "this or micro_batch_sequences, found both"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens"),
        ({"support_slots": 0}, "support_slots"),
        ({"optimizer": {"betas": [1.0, 0.95]}}, r"optimizer\.betas\.0: expected a number less than 1"),
        ({"optimizer": {"kind": "muon", "momentum": 1.0}}, r"optimizer\.momentum: expected a number less than 1"),
        ({"further_corpora": [{"store": "s", "weight": 0.7}] * 2}, "leave the first store the rest of 1"),
        (
            {"further_corpora": [{"store": "s", "weight": 0.1}], "further_teachers": [{"store": "s", "weight": 0.1}]},
            "this or further_teachers, found both",
        ),
        ({"skip_steps": [[-1, 3]]}, "skip_steps"),
        ({"cache": {"folder": "/f"}}, "cache.max_bytes"),
        ({"stream": {"threads": 0}}, "stream.threads"),
        ({"stream": {"prefetch": 1}}, "stream.prefetch"),
        ({"evaluate_every": 5}, "held_out"),
        ({"schedule": {"warmup_steps": 101}}, "at most the 100 steps, found 101"),
        ({"manifest": "newest"}, "manifest"),
        ({"vocab_size": 50}, "vocab_size"),
    ],
)
def test_settings_that_cannot_be_used_name_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_settings(TrainSettings, {**LEAST, **changes}, where="train.yaml")


@pytest.mark.parametrize(
    "loss",
    [
        {"kind": "decoupled", "temperature": 2.0},
        {"kind": "jensen_shannon", "beta": 0.1},
        {"kind": "skew_kl", "alpha": 0.0, "weight": 1.0, "weight_schedule": "cosine"},
        {"kind": "reverse_kl", "min_entropy": 0.2, "full_weight_entropy": 2.0},
    ],
)
def test_loss_settings_come_back_from_what_they_are_dumped_to(loss: dict[str, Any]) -> None:
    settings = build_settings(TrainSettings, {**LEAST, "loss": loss}, where="train.yaml")
    assert settings.loss.model_dump(include=set(loss)) == loss
    assert build_settings(TrainSettings, settings.model_dump(), where="dump") == settings


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
