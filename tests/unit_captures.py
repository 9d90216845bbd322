"""Captures of one unit by a real teacher, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from logitstore.capture import UnitCapture
from logitstore.planning import CaptureSettings, build_plan
from logitstore.settings import build_settings
from logitstore.store.files import StoreFiles
from logitstore.store.plan import create_plan
from logitstore.teacher.loading import load_teacher


def build_unit_capture(store: Path, teacher_folder: Path, texts: list[str], **changes: Any) -> UnitCapture:
    """A capture whose only unit is 0, with its corpus and what it spills beside the store."""
    corpus = store.with_suffix(".jsonl")
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values = {
        "store": str(store),
        "corpus": {"files": [str(corpus)]},
        "teacher": {"model": str(teacher_folder), "device": "cpu"},
        "method": {"k": 16},
        "sequences": {"length": 64},
        "unit_bytes": 10**6,
    }
    settings = build_settings(CaptureSettings, {**values, **changes}, where="test")
    teacher = load_teacher(settings.teacher, settings.method, generate=settings.generate)
    files = StoreFiles(settings.store)
    plan = create_plan(files, build_plan(settings, teacher.identity))
    return UnitCapture(files, plan, teacher, settings.corpus, spill_folder=store.parent)
