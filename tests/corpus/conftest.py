"""A helper that reads every document of one file."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from logitstore.corpus.documents import DeadLetter, Document, read_documents
from logitstore.corpus.files import CorpusFile, CorpusSettings, list_corpus_files


def compress(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content)
    return zstandard.compress(content) if suffix == ".zst" else content


@pytest.fixture
def write_file(tmp_path: Path) -> Callable[[str, bytes], CorpusFile]:
    """Write bytes under a name, compressed as the name says, and list the file."""

    def write(name: str, content: bytes) -> CorpusFile:
        path = tmp_path / name
        path.write_bytes(compress(content, path.suffix))
        return list_corpus_files(CorpusSettings(files=[str(path)]))[0]

    return write


@pytest.fixture
def read_all() -> Callable[..., list[Document | DeadLetter]]:
    def read(
        file: CorpusFile, start: int = 0, stop: int | None = None, **settings: object
    ) -> list[Document | DeadLetter]:
        return list(read_documents(file, start, stop, CorpusSettings(files=["unused"], **settings)))

    return read
