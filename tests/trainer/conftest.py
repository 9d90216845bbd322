"""A small teacher that exists, and a store of what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from taught_stores import CONFIG, build_model, build_taught_records, fill_store
from transformers import PreTrainedModel
from vocabularies import build_byte_level, build_sentence_piece, fill_text_store

from logitstore.records import Record
from logitstore.settings import build_settings
from logitstore.store.logit_store import LogitStore
from trainer.config import TrainSettings
from trainer.sweep.settings import Sweep, read_sweep


@pytest.fixture(scope="session")
def teacher() -> PreTrainedModel:
    return build_model(seed=1)


@pytest.fixture(scope="session")
def taught_records(teacher: PreTrainedModel) -> list[Record]:
    return build_taught_records(teacher, 6)


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


@pytest.fixture(scope="session")
def text_store(tmp_path_factory: pytest.TempPathFactory) -> LogitStore:
    """Of text that both a teacher of 320 byte-level tokens and students with other tokenizers read."""
    return fill_text_store(tmp_path_factory.mktemp("text"), build_byte_level(320))


@pytest.fixture(scope="session")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a student's tokenizer, which is not the teacher's of `text_store`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    build_sentence_piece(330).tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def write_sweep_in(taught_store: LogitStore) -> Callable[..., Sweep]:
    """Function that writes a sweep file with short runs into a folder, and reads it."""

    def write(folder: Path, **changes: object) -> Sweep:
        values: dict[str, object] = {
            "store": taught_store.url,
            "global_batch_sequences": 8,
            "steps": 6,
            "optimizer": {"learning_rate": 1e-2},
            "held_out": {"source": "held"},
            "log_every": 2,
            "device": "cpu",
            "output": str(folder / "sweep"),
        }
        folder.mkdir(exist_ok=True)
        path = folder / "sweep.yaml"
        path.write_text(yaml.safe_dump({**values, **changes}), encoding="utf-8")
        return read_sweep(path)

    return write


@pytest.fixture
def write_sweep(write_sweep_in: Callable[..., Sweep], tmp_path: Path) -> Callable[..., Sweep]:
    return lambda **changes: write_sweep_in(tmp_path, **changes)
