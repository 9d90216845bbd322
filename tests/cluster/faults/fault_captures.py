"""Captures that faults strike, and the one check of what they leave behind."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from capture_processes import PATIENCE_SECONDS
from tiny_models import save_model
from transformers import AutoTokenizer

from logitstore.store.commit import COMMITS, DATA, list_units, read_commit, read_quarantine
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.verify import verify_store

MARKER = "Ω"
"""A letter that no text has unless it is put there: one token of its own."""


@dataclass(frozen=True, kw_only=True)
class FaultCapture:
    """A capture with a tiny teacher: its settings file, and what it is of.

    Attributes:
        marked: documents that begin with the marker.
    """

    settings: Path
    url: str
    teacher: Path
    texts: tuple[str, ...]
    marked: frozenset[int]
    storage_options: dict[str, Any]

    @property
    def files(self) -> StoreFiles:
        return StoreFiles(self.url, self.storage_options)

    def count_commits(self) -> int:
        return len(list_units(self.files, COMMITS))

    @property
    def marker_id(self) -> int:
        """The token that no other text has."""
        [*_, last] = AutoTokenizer.from_pretrained(self.teacher)(MARKER)["input_ids"]
        return int(last)


def make_capture(
    folder: Path,
    *,
    num_documents: int = 96,
    num_units: int = 24,
    repeats: int = 40,
    marked: frozenset[int] = frozenset(),
    url: str | None = None,
    storage_options: dict[str, Any] | None = None,
    teacher_folder: Path | None = None,
    **settings: Any,
) -> FaultCapture:
    """Write teacher, corpus and settings of a capture into a folder."""
    teacher = teacher_folder or save_model("llama", folder / "teacher")
    texts = tuple(
        (MARKER if i in marked else "abcdef") + f"value_{i:05d} = read({i:05d})\n" * repeats
        for i in range(num_documents)
    )
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values = {
        "store": url or str(folder / "store"),
        "storage_options": storage_options or {},
        "corpus": {"files": [str(corpus)]},
        "teacher": {"model": str(teacher), "device": "cpu"},
        "method": {"k": 8},
        "sequences": {"length": 64},
        "unit_bytes": corpus.stat().st_size // num_units,
        "actors": {"count": 2, "cpus": 1},
        **settings,
    }
    path = folder / "capture.yaml"
    path.write_text(yaml.safe_dump(values))
    return FaultCapture(
        settings=path,
        url=values["store"],
        teacher=teacher,
        texts=texts,
        marked=marked,
        storage_options=storage_options or {},
    )


def finish(process: subprocess.Popen[str], seconds: float = PATIENCE_SECONDS) -> tuple[dict[str, Any], str]:
    """The summary that a capture prints, and what it logs."""
    output, errors = process.communicate(timeout=seconds)
    assert process.returncode == 0, errors
    summary: dict[str, Any] = json.loads(output)
    return summary, errors


def check_whole(capture: FaultCapture, *, dead: frozenset[int] = frozenset(), reason: str | None = None) -> set[str]:
    """Every document is recorded once, all of it, or is a dead letter; every byte is what was committed.

    Args:
        capture: that has ended.
        dead: documents that are dead letters, for this reason.
    Returns:
        Data files that nothing refers to: garbage of attempts that were killed.
    """
    files = capture.files
    store = LogitStore.open(capture.url, storage_options=capture.storage_options)
    units = list(range(len(store.plan.build_unit_table())))
    assert list_units(files, COMMITS) == units
    assert store.manifest.units.tolist() == units
    assert not read_quarantine(files)
    statistics = store.compute_statistics()
    assert statistics.documents == len(capture.texts)
    assert statistics.dead_letters == ({reason: len(dead)} if dead else {})
    check_documents(capture, store, dead)
    verification = verify_store(files)
    assert verification.problems == ()
    assert verification.records == len(store)
    stored = {f"{DATA}/{file.name}" for file in files.list(DATA)}
    return stored - {read_commit(files, unit).file for unit in units}


def check_documents(capture: FaultCapture, store: LogitStore, dead: frozenset[int]) -> None:
    """Each token of each document was read once, where a teacher says what comes next, and none is missing."""
    read: Counter[tuple[str, int]] = Counter()
    tokens: dict[tuple[str, int], int] = {}
    for record in store:
        starts = [span.start for span in record.documents]
        for span, stop in zip(record.documents, [*starts[1:], len(record.token_ids)], strict=True):
            for place in range(span.start, stop):
                key = (span.document_id, span.document_offset + place - span.start)
                read[key] += place < record.num_positions
                assert tokens.setdefault(key, int(record.token_ids[place])) == int(record.token_ids[place])
    assert max(read.values()) == 1
    tokenizer = AutoTokenizer.from_pretrained(capture.teacher)
    expected = {}
    start = 0
    for number, text in enumerate(capture.texts):
        name = f"{capture.settings.parent / 'corpus.jsonl'}@{start}"
        start += len(json.dumps({"text": text})) + 1
        if number not in dead:
            ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            expected.update({(name, offset): token_id for offset, token_id in enumerate(ids)})
    assert tokens == expected
