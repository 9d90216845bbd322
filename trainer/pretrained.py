"""Pretrained models as their folders have them: all of their weights, and none that transformers made up."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from logitstore.errors import ConfigError

# What a name on the hub looks like; everything else is a path.
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_MOST_NAMED = 5


def load_pretrained(model: str | Path, dtype: torch.dtype, key: str) -> PreTrainedModel:
    """Load a causal language model of transformers.

    Args:
        model: its folder, or its name on the hub.
        dtype: of the weights.
        key: what names it, such as `student.model`.

    Raises:
        ConfigError: it cannot be loaded, or weights are missing or have another shape than its config says, which
            transformers would fill with random numbers.
    """
    check_is_there(model, key)
    expected = f"{key}: expected a causal language model of transformers, found {str(model)!r}"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(  # a pair, which its type does not say
            model, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ConfigError(f"{expected}: {error}") from error
    student: PreTrainedModel
    student, info = loaded
    _check_is_whole(expected, info)
    return student


def check_is_there(model: str | Path, key: str) -> None:
    """Check that what can only be a path is a folder; transformers would take it for a name, and ask the hub for it.

    Raises:
        ConfigError: there is no such folder.
    """
    if not _HUB_NAME.fullmatch(str(model)) and not Path(model).is_dir():
        raise ConfigError(
            f"{key}: expected a causal language model of transformers, found no folder {str(model)!r}; check the "
            "path, or give a name on the hub"
        )


def _check_is_whole(expected: str, info: Mapping[str, Any]) -> None:
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"{expected}, which has no weights for {_name_some(missing)}; transformers would make them up: give a "
            "model that was saved with them, or save one first that has them"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        shapes = (
            f"{name} ({list(there)} in the file, {list(here)} by config.json)" for name, there, here in mismatched
        )
        raise ConfigError(
            f"{expected}, whose weights are not what its config.json says: {_name_some(list(shapes))}; give the "
            "folder as it was saved"
        )


def _name_some(names: list[str]) -> str:
    rest = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
