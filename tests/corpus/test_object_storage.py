"""A corpus on a real S3 server: lists that are current, and bytes that are whole over a wire that breaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from logitstore.corpus.documents import CorpusSettings, Document, list_corpus_files, read_documents
from logitstore.errors import CorpusError, IncompatibleStoreError
from logitstore.store.files import StoreFiles


@pytest.fixture
def other(s3_url: str) -> StoreFiles:
    """The bucket as another process sees it: nothing that the corpus's client keeps is shared."""
    return StoreFiles(s3_url, {"skip_instance_cache": True})


def test_corpus_listed_again_holds_what_others_wrote_and_deleted(s3_url: str, other: StoreFiles) -> None:
    settings = CorpusSettings(files=[f"{s3_url}/corpus/*.txt", f"{s3_url}/deep/**"])

    def list_names() -> list[str]:
        return [file.path.removeprefix(f"{s3_url}/") for file in list_corpus_files(settings)]

    other.put("corpus/a.txt", b"first")
    other.put("deep/er/x.txt", b"deep")
    assert list_names() == ["corpus/a.txt", "deep/er/x.txt"]
    other.put("corpus/b.txt", b"second")
    other.put("deep/y.txt", b"deep")
    assert list_names() == ["corpus/a.txt", "corpus/b.txt", "deep/er/x.txt", "deep/y.txt"]
    other.delete("corpus/a.txt")
    assert list_names() == ["corpus/b.txt", "deep/er/x.txt", "deep/y.txt"]


def test_corpus_file_that_changed_or_went_after_the_listing_is_noticed(s3_url: str, other: StoreFiles) -> None:
    settings = CorpusSettings(files=[f"{s3_url}/corpus/*.txt"])
    other.put("corpus/a.txt", b"first")
    [file] = list_corpus_files(settings)
    [document] = read_documents(file, 0, file.bytes, settings)
    assert isinstance(document, Document)
    assert document.text == "first"
    other.put("corpus/a.txt", b"another")
    with pytest.raises(IncompatibleStoreError, match=r"bytes in the plan: 5\n  bytes in the file: 7"):
        list(read_documents(file, 0, file.bytes, settings))
    [again] = list_corpus_files(settings)
    assert (again.bytes, again.fingerprint) != (file.bytes, file.fingerprint)
    other.delete("corpus/a.txt")
    with pytest.raises(CorpusError, match="expected a file, found nothing"):
        list(read_documents(file, 0, file.bytes, settings))


def test_corpus_as_a_single_object_is_found_without_a_glob(s3_url: str, other: StoreFiles, tmp_path: Path) -> None:
    other.put("corpus/a.txt", b"first")
    assert [file.bytes for file in list_corpus_files(CorpusSettings(files=[f"{s3_url}/corpus/a.txt"]))] == [5]
    other.put("corpus/a.txt", b"longer now")
    assert [file.bytes for file in list_corpus_files(CorpusSettings(files=[f"{s3_url}/corpus/a.txt"]))] == [10]
