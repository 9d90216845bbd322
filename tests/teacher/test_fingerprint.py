from __future__ import annotations

import json
from pathlib import Path

import pytest

from logitstore.errors import TeacherError
from logitstore.teacher.fingerprint import BLOCK_BYTES, NUM_BLOCKS, compute_weights_fingerprint, list_weights_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 4, "transformers_version": "5.0"}))
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    return tmp_path


def test_fingerprint_of_the_same_files_elsewhere_is_the_same(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    other = tmp_path_factory.mktemp("copy")
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "README.md").write_text("not read")
    (other / "config.json").write_text(json.dumps({"transformers_version": "6.0", "hidden_size": 4}))
    assert compute_weights_fingerprint(other) == compute_weights_fingerprint(folder)


def test_fingerprint_with_changed_configuration_differs(folder: Path) -> None:
    before = compute_weights_fingerprint(folder)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 5}))
    assert compute_weights_fingerprint(folder) != before


@pytest.mark.parametrize("offset", [0, 1000, 2047])
def test_fingerprint_of_a_small_file_sees_every_byte(folder: Path, offset: int) -> None:
    before = compute_weights_fingerprint(folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[offset] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert compute_weights_fingerprint(folder) != before


@pytest.mark.parametrize("end", ["first", "last"])
def test_fingerprint_of_a_large_file_sees_both_ends(folder: Path, end: str) -> None:
    content = bytearray(3 * NUM_BLOCKS * BLOCK_BYTES + 5)
    (folder / "model.safetensors").write_bytes(content)
    before = compute_weights_fingerprint(folder)
    content[0 if end == "first" else -1] = 1
    (folder / "model.safetensors").write_bytes(content)
    assert compute_weights_fingerprint(folder) != before


def test_weights_files_with_an_index_are_those_it_names(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name in ("model-2.safetensors", "model-1.safetensors", "consolidated.safetensors"):
        (folder / name).write_bytes(b"x")
    weight_map = {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert [path.name for path in list_weights_files(folder)] == ["model-1.safetensors", "model-2.safetensors"]


def test_weights_files_with_safetensors_and_pickles_are_the_safetensors(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert [path.name for path in list_weights_files(folder)] == ["model.safetensors"]


def test_fingerprint_of_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(TeacherError, match="found neither; save the model"):
        compute_weights_fingerprint(folder)


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_fingerprint_without_a_usable_configuration_is_refused(folder: Path, content: str | None) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(TeacherError, match=r"config\.json"):
        compute_weights_fingerprint(folder)
