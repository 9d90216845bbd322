"""The whole way once on one machine: `logitstore quickstart`."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
TEACHER = HERE / "teacher"  # a model of 5 million parameters, with its tokenizer
