"""The figures of a run over its steps, out of the metrics that it writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A figure over steps, as (step, value)."""

    name: str
    points: tuple[tuple[int, float], ...]


def read_curves(path: Path) -> tuple[Curve, ...]:
    """Every figure of a metrics file as a curve over steps; none where there is no file.

    A run that goes on from a checkpoint writes some steps again: the last line of a step counts.
    """
    points: dict[str, dict[int, float]] = {}
    for values in read_metrics(path):
        step = int(values.pop("step"))
        for name, value in values.items():
            points.setdefault(name, {})[step] = float(value)
    return tuple(Curve(name=name, points=tuple(sorted(values.items()))) for name, values in points.items())


def read_metrics(path: Path) -> Sequence[dict[str, Any]]:
    """Whole lines only: a line that is being written has no end yet."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
