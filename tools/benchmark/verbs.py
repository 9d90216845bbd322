"""Measurements as commands: each gets the options that all commands have."""

from __future__ import annotations

import functools
import inspect
import logging
import typing
from collections.abc import Callable
from typing import Any

from tools.logs import AsJson, Quiet, Verbose, set_up_logs

_OPTIONS = {"as_json": AsJson, "quiet": Quiet, "verbose": Verbose}
# What is measured would otherwise be measured with the lines that it writes.
_MEASURED = ("logitstore", "trainer", "cluster")


def as_verb(measure: Callable[..., None]) -> Callable[..., None]:
    """The command of a measurement, with --json, --quiet and --verbose behind its own options."""

    @functools.wraps(measure)
    def command(*, as_json: bool, quiet: bool, verbose: bool, **arguments: Any) -> None:
        set_up_logs(quiet=quiet, verbose=verbose)
        for name in () if quiet or verbose else _MEASURED:
            logging.getLogger(name).setLevel(logging.WARNING)
        if not as_json:
            measure(**arguments)
            return
        from tools.benchmark.tables import collect_page
        from tools.look import print_json

        with collect_page() as page:
            measure(**arguments)
        print_json({**page.heading, "parts": page.parts})

    hints = typing.get_type_hints(measure, include_extras=True)
    own = [
        one.replace(annotation=hints[one.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for one in inspect.signature(measure).parameters.values()
    ]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option)
        for name, option in _OPTIONS.items()
    ]
    command.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]  # what inspect looks for
    command.__annotations__ = {**hints, **_OPTIONS}
    return command
