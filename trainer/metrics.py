"""Metrics of a run: lines of JSON, and the same numbers for TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from trainer.writing import writing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class JsonLines:
    """An append-only file of JSON objects that each have a `step`, the number of optimizer steps done by then.

    Opening one at a step drops what a run that was killed wrote after that step: a resumed run writes it again.
    """

    def __init__(self, path: Path, *, first_step: int) -> None:
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                drop_later_lines(path, first_step)
            # Without a buffer: what a full disk did not take would be in the way when the file is closed.
            self._file: IO[bytes] = path.open("ab", buffering=0)

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Append one line, and hand it to the operating system before returning.

        Raises:
            OutsideError: there is no room for it.
        """
        line = (json.dumps({"step": step, **values}, allow_nan=False) + "\n").encode()
        with writing(self._path):
            while line:  # a disk that is about to be full takes a part of it
                line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()


class MetricsWriter:
    """Writes scalars under names such as `train/loss` to metrics.jsonl and, where it is installed, TensorBoard."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        self._lines = JsonLines(folder / "metrics.jsonl", first_step=first_step)
        self._tensorboard = _open_tensorboard(folder / "tensorboard", first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._lines.write(step, values)
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()

    def close(self) -> None:
        self._lines.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def drop_later_lines(path: Path, first_step: int) -> None:
    """Drop what a run that was killed wrote after a step to a file of `JsonLines`."""
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _read_step(line) <= first_step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def _read_step(line: str) -> float:
    """Step of a line; infinity for the torn last line of a run that was killed while it wrote."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _open_tensorboard(folder: Path, first_step: int) -> SummaryWriter | None:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    options: dict[str, Any] = {"purge_step": first_step + 1} if first_step else {}
    return SummaryWriter(str(folder), **options)
