"""Fingerprint of a model's weights, from a few reads per file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from logitstore.errors import TeacherError

# A whole hash of a large model takes minutes per actor. Blocks spread over every file tell checkpoints of one training
# run apart, since an optimizer step moves nearly every weight; they may miss an edit of a single matrix.
NUM_BLOCKS = 16
BLOCK_BYTES = 64 * 1024
# What a library writes beside the facts.
_NOT_FACTS = frozenset({"transformers_version", "_name_or_path"})


def compute_weights_fingerprint(folder: Path) -> str:
    """Hex sha256 over the configuration, and over name, size and 16 evenly spaced blocks of each weights file.

    Files of up to 1 MiB are read whole.

    Raises:
        TeacherError: there is no config.json, or there are no weights.
    """
    config = read_config(folder)
    facts = {key: value for key, value in config.items() if key not in _NOT_FACTS}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for path in list_weights_files(folder):
        num_bytes = path.stat().st_size
        digest.update(f"\n{path.name} {num_bytes}\n".encode())
        with path.open("rb") as stream:
            if num_bytes <= NUM_BLOCKS * BLOCK_BYTES:
                digest.update(stream.read())
                continue
            for block in range(NUM_BLOCKS):
                stream.seek((num_bytes - BLOCK_BYTES) * block // (NUM_BLOCKS - 1))
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


def list_weights_files(folder: Path) -> list[Path]:
    """The weights files that transformers loads, in name order: safetensors before pickles, an index before a guess.

    Raises:
        TeacherError: there are none.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if (folder / f"{stem}.{suffix}").exists():
            return [folder / f"{stem}.{suffix}"]
        if index.exists():
            return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not found:
        raise TeacherError(f"{folder}: expected model.safetensors or pytorch_model.bin, found neither; save the model")
    return found


def read_config(folder: Path) -> dict[str, object]:
    """config.json of a model's folder.

    Raises:
        TeacherError: there is none, or it is no JSON object.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TeacherError(f"{folder}: expected a model with a config.json, found none; check the path") from None
    except ValueError as error:
        raise TeacherError(f"{folder}/config.json: expected JSON, found: {error}; save the model again") from None
    if not isinstance(config, dict):
        raise TeacherError(f"{folder}/config.json: expected a JSON object, found {type(config).__name__}")
    return config
