"""Settings files: every mistake is a ConfigError that names it, and no secret is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from logitstore.errors import ConfigError
from logitstore.settings import Settings, build_settings, read_settings


class Inner(Settings):
    k: int = 1
    api_key: str = ""


class One(Settings):
    kind: Literal["one"] = "one"
    first: int = 1


class Two(Settings):
    kind: Literal["two"] = "two"
    second: int = 2


class Outer(Settings):
    urls: tuple[str, ...] = ()
    inner: Inner = Inner()
    inners: tuple[Inner, ...] = ()
    maybe: Inner | None = None
    choice: Annotated[One | Two, Field(discriminator="kind")] = One()
    storage_options: dict[str, int] = Field(default_factory=dict)


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text)
    return path


def test_override_wins_over_the_file(tmp_path: Path) -> None:
    assert read_settings(Outer, write(tmp_path, "inner: {k: 2}"), ["inner.k=3", "urls=[a]"]) == Outer(
        urls=("a",), inner=Inner(k=3)
    )


@pytest.mark.parametrize(
    "values",
    [
        {"inner": {"api_key": {"hunter2": 1}}},
        {"inner": {"api_key": ["hunter2"]}},
        {"storage_options": {"account": "hunter2"}},
        {"storage_options": "hunter2"},
        {"stroage_options": {"key": "hunter2"}},
        {"passwort": "hunter2"},
        {"inner": {"k": {"deep": "hunter2"}}},
        {"inner": "ftp://user:hunter2@host"},
        ["hunter2"],
    ],
)
def test_error_never_prints_what_may_be_a_secret(values: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be used") as raised:
        build_settings(Outer, values, where="here")
    assert "hunter2" not in str(raised.value)


def test_error_prints_key_expectation_and_plain_value() -> None:
    with pytest.raises(ConfigError, match=r"here: 1 setting\(s\).*\n  inner.k: expected a valid int.*, found 'x'"):
        build_settings(Outer, {"inner": {"k": "x"}}, where="here")


@pytest.mark.parametrize("override", ["inner.k=[hunter2", "inner.k={a: hunter2: b}", "inner.k.deep=hunter2"])
def test_override_that_cannot_be_used_is_named_without_its_value(tmp_path: Path, override: str) -> None:
    path = write(tmp_path, "inner: {k: 2}")
    with pytest.raises(ConfigError, match=r"override 'inner.k") as raised:
        read_settings(Outer, path, [override])
    assert "hunter2" not in str(raised.value)


def test_settings_file_that_is_no_yaml_is_told_by_line_and_not_quoted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected YAML, found .* in line 2, column \d+") as raised:
        read_settings(Outer, write(tmp_path, "a: 1\nsecret: hunter2: x\n"))
    assert "hunter2" not in str(raised.value)


def test_settings_file_that_is_a_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a YAML file, found one that cannot be read") as raised:
        read_settings(Outer, tmp_path)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("values", "known"),
    [
        ({"inner": {"q": 1}}, "k, api_key"),
        ({"inners": [{}, {"q": 1}]}, "k, api_key"),
        ({"maybe": {"q": 1}}, "k, api_key"),
        ({"choice": {"kind": "two", "q": 1}}, "kind, second"),
        ({"q": 1}, "urls, inner, inners, maybe, choice, storage_options"),
    ],
)
def test_unknown_key_is_told_the_keys_of_its_own_section(values: Any, known: str) -> None:
    with pytest.raises(ConfigError) as raised:
        build_settings(Outer, values, where="here")
    assert str(raised.value).endswith(f"q: expected no such key; known keys: {known}")


def test_key_that_stands_twice_in_a_mapping_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be used"):  # keys of a model; what `<<` brings may be replaced
        read_settings(Settings, path)
    path.write_text("students:\n  small: {}\n  small: {}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="found the key 'small' for a second time in line 3, column 3"):
        read_settings(Settings, path)
