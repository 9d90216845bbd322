from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from logitstore.corpus.documents import DeadLetter, Document, read_documents
from logitstore.corpus.files import CorpusSettings, list_corpus_files
from logitstore.corpus.measuring import build_unit_table, estimate_decompressed_bytes
from logitstore.errors import ConfigError


def build_lines(count: int, seed: int = 0) -> bytes:
    generator = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    texts = (" ".join(generator.choices(words, k=generator.randint(1, 60))) for _ in range(count))
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_estimate_of_a_small_file_is_exact(suffix: str, tmp_path: Path) -> None:
    content = build_lines(500)
    whole = gzip.compress(content) if suffix == ".gz" else zstandard.compress(content)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(whole + whole)
    (file,) = list_corpus_files(CorpusSettings(files=[f"{tmp_path}/*"]))
    assert estimate_decompressed_bytes(file) == 2 * len(content)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_estimate_of_a_large_file_is_near(suffix: str, tmp_path: Path) -> None:
    content = build_lines(100_000)
    whole = gzip.compress(content, 1) if suffix == ".gz" else zstandard.compress(content)
    assert len(whole) > 1_500_000
    (tmp_path / f"a.jsonl{suffix}").write_bytes(whole)
    (file,) = list_corpus_files(CorpusSettings(files=[f"{tmp_path}/*"]))
    assert estimate_decompressed_bytes(file) == pytest.approx(len(content), rel=0.15)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_estimate_of_something_else_is_refused(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(b"not compressed at all")
    (file,) = list_corpus_files(CorpusSettings(files=[f"{tmp_path}/*"]))
    with pytest.raises(ConfigError, match=r"expected (gzip|zstd) data, found"):
        estimate_decompressed_bytes(file)


@pytest.mark.parametrize("unit_bytes", [80, 500, 20_000, 10**9])
def test_units_of_a_mixed_corpus_give_every_document_once(unit_bytes: int, tmp_path: Path) -> None:
    content = build_lines(60)
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(content))
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(20)]}), tmp_path / "d.parquet", row_group_size=3)
    (tmp_path / "e.txt").write_text("plain")
    (tmp_path / "f.txt").write_text("")
    settings = CorpusSettings(files=[f"{tmp_path}/*"])
    files = list_corpus_files(settings)
    units = build_unit_table(files, unit_bytes, settings)

    def read(index: int, start: int, stop: int | None) -> list[Document | DeadLetter]:
        return list(read_documents(files[index], start, stop, settings))

    found = [
        item.document_id
        for unit in range(len(units))
        for span in units.spans(unit)
        for item in read(span.file_index, span.start, span.stop)
    ]
    assert found == [item.document_id for i in range(len(files)) for item in read(i, 0, None)]
    assert len(found) == len(set(found)) == 3 * 60 + 20 + 1
