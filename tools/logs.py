"""Logs of a command: lines on stderr, above a progress bar where there is one; options that every command has."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import IO, Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, and only errors on stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr, libraries included.")]


def offer(*values: str) -> Callable[[], list[str]]:
    """What a shell offers as values of an option (`autocompletion=`)."""
    return lambda: list(values)


_OURS = ("logitstore", "trainer", "cluster", "tools")
# Libraries that complain about themselves when transformers tries them out: of kernels for other machines, and of
# other libraries' enumerations.
_NOISY = ("torchao", "torch.utils._pytree")
# Libraries that write to stderr past the root logger, and the variable that says how much.
_OUTSPOKEN = {"transformers": "TRANSFORMERS_VERBOSITY", "huggingface_hub": "HF_HUB_VERBOSITY"}


class _StderrHandler(logging.StreamHandler[IO[str]]):
    """Writes to what stderr is at the moment: a live progress bar puts itself in its place."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> IO[str]:
        return sys.stderr

    @stream.setter
    def stream(self, stream: IO[str]) -> None:
        raise AttributeError("the stream is always stderr")


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else text.replace(" ", f" {record.levelname.lower()}: ", 1)


def set_up_logs(*, quiet: bool, verbose: bool) -> None:
    """Send the project's logs to stderr, less of them when quiet; when verbose also what libraries have to say.

    Progress bars of libraries are for terminals only; child processes keep to that too.
    """
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    if quiet:
        _silence_libraries()
    handler = _StderrHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    ours = [logging.getLogger(name) for name in _OURS]
    for logger in (root, *ours):
        for earlier in [known for known in logger.handlers if isinstance(known, _StderrHandler)]:
            logger.removeHandler(earlier)
    for logger in ours:
        logger.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.NOTSET if verbose else logging.ERROR)
    # Libraries with a handler of their own would say everything twice if the root had ours.
    for logger in [root] if verbose else ours:
        logger.addHandler(handler)
    root.setLevel(logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING)


def _silence_libraries() -> None:
    for name, variable in _OUTSPOKEN.items():
        os.environ.setdefault(variable, "error")
        logging.getLogger(name).setLevel(logging.ERROR)  # where it is loaded already
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
