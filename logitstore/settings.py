"""Settings: YAML files read into frozen pydantic models, with `section.key=value` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from logitstore.errors import ConfigError
from logitstore.expectations import describe_expectation
from logitstore.url_secrets import hide_secrets

# Values below keys that contain one of these are never printed.
_SECRET_WORDS = ("storage_options", "secret", "key", "token", "password", "credential")


class Settings(BaseModel):
    """Base of every settings model: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _OneOfEachLoader(yaml.SafeLoader):
    """Reads YAML, but for mappings that have a key twice, of which PyYAML would silently take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping as it is written, without what `<<` brings."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        found = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in found:
                    problem = f"the key {key.value!r} for a second time"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                found.add((key.tag, key.value))
        return node


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
            found = _describe_found(problem["type"], problem["loc"], problem["input"])
            known = _describe_known_keys(model, problem["loc"]) if problem["type"] == "extra_forbidden" else ""
            lines.append(f"  {key}: {describe_expectation(problem['msg'])}{found}{known}")
        raise ConfigError(f"{where}: {len(lines)} setting(s) cannot be used:\n" + "\n".join(lines)) from None


def _describe_known_keys(model: type[Settings], location: tuple[int | str, ...]) -> str:
    """'; known keys: …' of the section that an unknown key stands in; nothing where it may be one of several."""
    sections = [model]
    for part in location[:-1]:
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        if fields:  # else a place in a list, a key of a mapping, or the tag of a choice
            sections = [found for field in fields for found in _find_sections(field.annotation)]
        elif len(sections) > 1:
            sections = [
                section
                for section in sections
                if any(part in get_args(field.annotation) for field in section.model_fields.values())
            ]
    return f"; known keys: {', '.join(sections[0].model_fields)}" if len(sections) == 1 else ""


def _find_sections(annotation: object) -> list[type[Settings]]:
    """The settings models that a type holds, such as those of a list or of a choice."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation] if issubclass(annotation, Settings) else []
    return [found for part in get_args(annotation) for found in _find_sections(part)]


def _describe_found(kind: str, location: tuple[int | str, ...], value: object) -> str:
    """', found …' for an error message; nothing where the value might be a secret, or hold one."""
    if kind in ("missing", "extra_forbidden") or not isinstance(value, str | int | float | None):
        return ""
    if any(word in str(part).lower() for part in location for word in _SECRET_WORDS):
        return ""
    return f", found {hide_secrets(value) if isinstance(value, str) else value!r}"


def read_settings(model: type[SettingsT], path: str | Path, overrides: Sequence[str] = ()) -> SettingsT:
    """Read a YAML file into a settings model and apply overrides such as `method.k=32`.

    Raises:
        ConfigError: the file is missing or no YAML mapping, an override has no '=' or no YAML value, or a setting is
            wrong.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _OneOfEachLoader)  # a SafeLoader
    except FileNotFoundError:
        raise ConfigError(f"{path}: expected a file of settings, found none; give the path of a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: expected a YAML file, found one that cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected YAML, found {_describe_yaml_error(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    return build_settings(model, values, where=str(path))


def _describe_yaml_error(error: Exception) -> str:
    """What is wrong and where, without the lines themselves: there may be secrets in them."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return type(error).__name__ if isinstance(error, yaml.YAMLError) else str(error)
    return f"{getattr(error, 'problem', None) or 'a mistake'} in line {mark.line + 1}, column {mark.column + 1}"


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {key!r}: expected section.key=value")
    *sections, last = key.split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"override {key!r}: {section!r} is a value, not a section")
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {key!r}: expected a YAML value, found {_describe_yaml_error(error)}") from None
