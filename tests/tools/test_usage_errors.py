"""Arguments that no command can have, told in the form of all errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from logitstore.expectations import describe_expectation
from tools.cli import app


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("unheard-of", "logitstore: expected a command, found 'unheard-of'; see 'logitstore --help'"),
        ("statu", "logitstore: expected a command, found 'statu'; Did you mean 'status'? see 'logitstore --help'"),
        ("--quie status a", "logitstore: expected one of its options, found '--quie'; see 'logitstore --help'"),
        ("status", "logitstore status: expected STORE, found none; see 'logitstore status --help'"),
        ("gc a b", "logitstore gc: expected no further argument, found 'b'; see 'logitstore gc --help'"),
        (
            "gc a --grace-hour 2",
            "logitstore gc: expected one of its options, found '--grace-hour'; did you mean --grace-hours? see "
            "'logitstore gc --help'",
        ),
        (
            "gc a --grace-hours -1",
            "logitstore gc: --grace-hours: expected a number greater than or equal to 0, found '-1'; see 'logitstore "
            "gc --help'",
        ),
        (
            "verify --workers=x a",
            "logitstore verify: --workers: expected a valid integer, found 'x'; see 'logitstore verify --help'",
        ),
        ("gc a --grace-hours", "logitstore: --grace-hours: expected a value, found none; see 'logitstore --help'"),
        (
            "benchmark codec --teacher big",
            "logitstore benchmark codec: --teacher: expected one of 'quickstart', 'synthetic', found 'big'; see "
            "'logitstore benchmark codec --help'",
        ),
    ],
)
def test_argument_that_cannot_be_is_told_with_what_was_expected_and_found(
    arguments: str, message: str, logitstore: Any
) -> None:
    assert logitstore(*arguments.split(), exit_code=2) == ("", f"error: {message}\n")


@pytest.mark.parametrize("group", [[], ["submit"], ["convert"], ["benchmark"]], ids=" ".join)
def test_group_of_verbs_alone_shows_its_help(group: list[str]) -> None:
    result = CliRunner().invoke(app, group, prog_name="logitstore")
    assert result.exit_code == 2
    assert result.output.startswith(" ".join(["Usage: logitstore", *group]))
    assert "error: " not in result.output


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("Input should be a valid integer, unable to parse string as an integer", "expected a valid integer"),
        ("Input should be less than 1", "expected a number less than 1"),
        ("Input should be 'a' or 'b'", "expected 'a' or 'b'"),
        ("Input tag 'c' found using 'kind' does not match any of the expected tags: 'a', 'b'",
         "expected one of 'a', 'b', found 'c'"),
        ("Field required", "expected a value, found none"),
        ("Value error, expected more, found less", "expected more, found less"),
        ("String should have at least 1 character", "String should have at least 1 character"),
    ],
)  # fmt: skip
def test_words_of_a_validation_become_an_expectation(message: str, told: str) -> None:
    assert describe_expectation(message) == told


def test_verify_that_finds_damage_says_so_in_the_last_line(small_store_url: str, flip: Any, logitstore: Any) -> None:
    [shard, *_] = sorted(Path(small_store_url, "data").iterdir())
    flip(shard, 100)
    stdout, stderr = logitstore("verify", small_store_url, exit_code=3)
    assert "1 problem." in stdout
    assert stderr.startswith(f"error: {small_store_url}: expected what the store says of itself, found 1 problem; ")
