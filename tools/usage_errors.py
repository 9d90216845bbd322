"""What is wrong with the arguments of a command, in the form of the project's errors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import typer

from logitstore.expectations import describe_expectation

# Typer exports its subclasses alone.
UsageError: Any = typer.BadParameter.__base__

_OTHERS = (
    (r"No such command '(?P<found>.*?)'\.(?P<rest>.*)", "expected a command, found {found!r};{rest}"),
    (r"Got unexpected extra arguments?(?:\(s\))? \((?P<found>.*)\)", "expected no further argument, found {found!r}"),
    (r"Option '(?P<option>.*)' requires an argument\.", "{option}: expected a value, found none"),
    (r"Option '(?P<option>.*)' does not take a value\.", "{option}: expected no value, found one"),
)


def describe_usage_error(error: Any, arguments: Sequence[str]) -> str | None:
    """*Where: what was expected, what was found; what to do.* None where it is the help that is printed.

    Args:
        error: a usage error of typer.
        arguments: of the whole command line.
    """
    where = "logitstore" if error.ctx is None else error.ctx.command_path
    advice = f"see '{where} --help'"
    kind = type(error).__name__
    if kind == "NoArgsIsHelpError":
        return None
    if kind == "NoSuchOption":
        known = sorted(error.possibilities or ())
        meant = f"did you mean {' or '.join(known)}? " if known else ""
        return f"{where}: expected one of its options, found {error.option_name!r}; {meant}{advice}"
    if kind == "MissingParameter":
        return f"{where}: expected {_name_parameter(error.param)}, found none; {advice}"
    if isinstance(error, typer.BadParameter):
        return f"{where}: {_describe_value(error, arguments)}; {advice}"
    told = _find_form(error.message, _OTHERS) or error.message
    return f"{where}: {told.rstrip(';')}{' ' if told.endswith('?') else '; '}{advice}"


def _describe_value(error: typer.BadParameter, arguments: Sequence[str]) -> str:
    expected, value = describe_expectation(error.message), _find_value(error.param, arguments)
    found = "" if value is None or "found" in expected else f", found {value!r}"
    return f"{_name_parameter(error.param)}: {expected}{found}"


def _find_form(message: str, forms: Sequence[tuple[str, str]]) -> str | None:
    for pattern, form in forms:
        if match := re.fullmatch(pattern, message, re.DOTALL):
            return form.format(**match.groupdict())
    return None


def _name_parameter(parameter: Any) -> str:
    if parameter is None:
        return "arguments"
    if parameter.param_type_name == "option":
        return str(max(parameter.opts, key=len))
    return str(parameter.metavar or parameter.name.upper())


def _find_value(parameter: Any, arguments: Sequence[str]) -> str | None:
    """What the command line has for an option; None where that is not found."""
    for i, argument in enumerate(arguments):
        name, separator, value = argument.partition("=")
        if parameter is not None and name in parameter.opts:
            return value if separator else next(iter(arguments[i + 1 :]), None)
    return None
