"""Settings: YAML files read into frozen pydantic models, with `section.key=value` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from logitstore.errors import ConfigError


class Settings(BaseModel):
    """Base of every settings model: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


SettingsT = TypeVar("SettingsT", bound=Settings)


def build_settings(model: type[SettingsT], values: object, *, where: str) -> SettingsT:
    """Validate plain values against a settings model.

    Raises:
        ConfigError: names `where`, every key that is wrong, what was expected and what was found.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"]) or "(whole file)"
            found = "" if problem["type"] == "missing" else f", found {problem['input']!r}"
            known = f"; known keys: {', '.join(model.model_fields)}" if problem["type"] == "extra_forbidden" else ""
            lines.append(f"  {key}: {problem['msg']}{found}{known}")
        raise ConfigError(f"{where}: {len(lines)} setting(s) cannot be used:\n" + "\n".join(lines)) from None


def read_settings(model: type[SettingsT], path: str | Path, overrides: Sequence[str] = ()) -> SettingsT:
    """Read a YAML file into a settings model and apply overrides such as `method.k=32`.

    Raises:
        ConfigError: the file is missing or no YAML mapping, an override has no '=', or a setting is wrong.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such settings file; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected YAML, found {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    return build_settings(model, values, where=str(path))


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: expected section.key=value")
    *sections, last = key.split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
    target[last] = yaml.safe_load(text)
