"""A small teacher that exists, and a store of what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import VOCAB_SIZE, build_identity, build_plan, build_signal, put_shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from logitstore.records import Record, RecordAddress
from logitstore.settings import build_settings
from logitstore.store.commit import build_attempt, commit_unit
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import write_manifest
from logitstore.store.plan import create_plan
from trainer.config import TrainSettings

TOP_K = 8
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


def build_model(seed: int, **changes: object) -> PreTrainedModel:
    """A tiny Llama in float32; the large initial weights give distributions that are neither flat nor certain."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{**CONFIG, "vocab_size": VOCAB_SIZE, "initializer_range": 0.5, **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def build_taught_records(
    teacher: PreTrainedModel, num_records: int, *, unit: int = 0, top_k: int = TOP_K
) -> list[Record]:
    """Records of unequal lengths with the exact signals of a model, drawn and summed in float64."""
    generator = np.random.default_rng([7, unit])
    records = []
    for index in range(num_records):
        positions = int(generator.integers(4, 13))
        token_ids = generator.integers(0, VOCAB_SIZE, positions + 1).astype(np.int32)
        with torch.no_grad():
            logits = teacher(input_ids=torch.from_numpy(token_ids[None, :-1].astype(np.int64))).logits[0]
        records.append(
            Record(
                address=RecordAddress(unit=unit, index=index),
                token_ids=token_ids,
                loss_mask=generator.random(positions) < 0.8,
                signal=build_signal(logits.double().numpy(), token_ids[1:], top_k),
            )
        )
    return records


@pytest.fixture(scope="session")
def teacher() -> PreTrainedModel:
    return build_model(seed=1)


@pytest.fixture(scope="session")
def taught_records(teacher: PreTrainedModel) -> list[Record]:
    return build_taught_records(teacher, 6)


def fill_store(folder: Path, teacher: PreTrainedModel, units: range) -> LogitStore:
    """Commit some of the four units of a store (16 records each, the last unit of the source `held`), then open it."""
    files = StoreFiles(str(folder / "store"))
    # A path, so that nobody looks for the teacher's tokenizer on a network.
    identity = build_identity(model=str(folder / "teacher"))
    plan = create_plan(files, build_plan(4, sources=("train", "train", "train", "held"), teacher=identity))
    for unit in units:
        records = build_taught_records(teacher, 16, unit=unit)
        commit_unit(files, put_shard(files, plan, unit, records, build_attempt(), folder))
    write_manifest(files, plan.compute_fingerprint())
    return LogitStore.open(files.url)


@pytest.fixture(scope="session")
def taught_store(teacher: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> LogitStore:
    return fill_store(tmp_path_factory.mktemp("taught"), teacher, range(4))


@pytest.fixture
def grow_store(teacher: PreTrainedModel, tmp_path: Path) -> Callable[[range], LogitStore]:
    """Function that commits more units to a store of this test's own."""
    (tmp_path / "grown").mkdir()
    return lambda units: fill_store(tmp_path / "grown", teacher, units)


@pytest.fixture(scope="session")
def make_settings_in(taught_store: LogitStore) -> Callable[..., TrainSettings]:
    """Function that builds the settings of a short run in a folder, with whatever changes."""

    def make(output: Path, **changes: object) -> TrainSettings:
        values: dict[str, object] = {
            "store": taught_store.url,
            "student": {"config": CONFIG},
            "global_batch_sequences": 8,
            "steps": 8,
            "optimizer": {"learning_rate": 1e-2},
            "held_out": {"source": "held"},
            "log_every": 2,
            "output": str(output),
            "device": "cpu",
        }
        return build_settings(TrainSettings, {**values, **changes}, where="test")

    return make


@pytest.fixture
def make_settings(make_settings_in: Callable[..., TrainSettings], tmp_path: Path) -> Callable[..., TrainSettings]:
    """The same in a folder of the test's own, unless another `output` is among the changes."""
    return lambda **changes: make_settings_in(**{"output": tmp_path / "run", **changes})
