"""The quickstart's corpus: real files of this interpreter, cut the same way every time."""

from __future__ import annotations

import json
from pathlib import Path

from tools.quickstart.corpus import build_stdlib_root, is_held_out, read_sources, write_corpus


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_sources_are_plain_library_files_without_tests() -> None:
    sources = dict(read_sources(build_stdlib_root()))
    assert len(sources) > 300
    assert sources["json/decoder.py"] == (build_stdlib_root() / "json" / "decoder.py").read_text(encoding="utf-8")
    assert not any("site-packages" in path or path.startswith("test/") for path in sources)


def test_corpus_written_twice_is_the_same_and_keeps_held_out_files_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        counts = write_corpus(tmp_path / name, train_bytes=300_000, held_out_bytes=40_000)
    for part in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / "a" / part).read_bytes() == (tmp_path / "b" / part).read_bytes()
    train, held_out = read(tmp_path / "a" / "train.jsonl"), read(tmp_path / "a" / "held_out.jsonl")
    assert counts == {"train": len(train), "held_out": len(held_out)}
    assert not any(is_held_out(document["path"]) for document in train)
    assert all(is_held_out(document["path"]) for document in held_out)
    assert sum(len(document["text"].encode()) for document in train) >= 300_000
