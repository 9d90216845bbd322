"""How a command ends: errors become one message on stderr and an exit code.

0 done; 1 a bug, with its traceback; 2 usage or settings; 3 the store is damaged or incompatible; 4 trouble outside,
worth another try.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from logitstore.errors import LogitStoreError
from tools.look import print_error
from tools.ownership import check_packages_are_ours
from tools.usage_errors import UsageError, describe_usage_error

_LOG = logging.getLogger("logitstore")
# What brings a module that the base installation does without; train and evaluate have an extra of their own.
_EXTRA_OF_MODULE = {
    "ray": "ray",
    "torch": "teacher",
    "transformers": "teacher",
    "tokenizers": "teacher",
    "safetensors": "teacher",
    "tensorboard": "train",
    "httpx2": "api",
    "duckdb": "query",
}
_EXTRA_OF_VERB = {
    "train": "train",
    "sweep": "train",
    "evaluate": "train",
    "export": "train",
    "capture": "teacher,ray",
    "quickstart": "quickstart",
}


class Verbs(TyperGroup):
    """The group of all commands, which gives errors their exit codes."""

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Read the options that stand before the verb."""
        self._arguments = list(args)
        try:
            return super().make_context(info_name, args, parent, **extra)
        except UsageError as error:
            self._refuse(error)

    def _refuse(self, error: UsageError) -> NoReturn:
        message = describe_usage_error(error, self._arguments)
        if message is None:  # help was asked for by saying nothing
            raise error
        _complain(message)
        raise typer.Exit(2) from None

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            check_packages_are_ours()
            result = super().invoke(ctx)
            sys.stdout.flush()
        except UsageError as error:
            self._refuse(error)
        except LogitStoreError as error:
            if error.exit_code == 1:
                raise
            _LOG.debug("raised here:", exc_info=error)
            _complain(str(error))
            raise typer.Exit(error.exit_code) from None
        except ModuleNotFoundError as error:
            advice = _find_extra(error.name, ctx.invoked_subcommand)
            if advice is None:
                raise
            _LOG.debug("raised here:", exc_info=error)
            _complain(
                f"python environment: expected the package {error.name!r}, found none; install it with\n"
                f"  pip install 'logitstore[{advice}]'"
            )
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            _complain("interrupted; what is done stays done, and the same command goes on from there")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # Whoever read our output has seen enough; Python would complain once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(128 + 13) from None  # as if SIGPIPE had ended us
        return result


def _find_extra(module: str | None, verb: str | None) -> str | None:
    """The extra to install for a missing module; None for a module that should be there."""
    extra = _EXTRA_OF_MODULE.get((module or "").partition(".")[0])
    if extra == "api":
        return "api,ray"
    return extra and _EXTRA_OF_VERB.get(verb or "", extra)


def _complain(message: str) -> None:
    print_error(f"error: {message}")
