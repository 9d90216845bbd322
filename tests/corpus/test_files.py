from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from logitstore.corpus.files import CorpusFile, CorpusSettings, list_corpus_files, reading
from logitstore.errors import ConfigError, OutsideError
from logitstore.settings import build_settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.jsonl.gz", "c.NDJSON.zst", "d.json", "e.parquet", "sub/f.py", "sub/deep/g.txt.gz"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path


def names(files: list[CorpusFile], folder: Path) -> list[str]:
    return [str(Path(file.path).relative_to(folder)) for file in files]


def test_listing_goes_by_pattern_then_path_and_keeps_a_file_once(folder: Path) -> None:
    settings = CorpusSettings(files=[f"{folder}/sub/**", f"{folder}/*.json*", f"{folder}/b.jsonl"])
    expected = ["sub/deep/g.txt.gz", "sub/f.py", "a.jsonl.gz", "b.jsonl", "d.json"]
    assert names(list_corpus_files(settings), folder) == expected


def test_listing_tells_format_and_compression_by_name(folder: Path) -> None:
    files = list_corpus_files(CorpusSettings(files=[f"{folder}/**"]))
    assert {Path(file.path).name: (file.format, file.compression) for file in files} == {
        "a.jsonl.gz": ("jsonl", "gzip"),
        "b.jsonl": ("jsonl", "none"),
        "c.NDJSON.zst": ("jsonl", "zstd"),
        "d.json": ("jsonl", "none"),
        "e.parquet": ("parquet", "none"),
        "f.py": ("text", "none"),
        "g.txt.gz": ("text", "gzip"),
    }


def test_listing_with_a_format_given_overrules_the_name(folder: Path) -> None:
    files = list_corpus_files(CorpusSettings(files=[f"{folder}/sub/**"], format="jsonl"))
    assert [(file.format, file.compression) for file in files] == [("jsonl", "gzip"), ("jsonl", "none")]


def test_listing_of_sources_keeps_their_order_and_names(folder: Path) -> None:
    settings = CorpusSettings(sources={"web": [f"{folder}/b.jsonl"], "code": [f"{folder}/a*"]})
    assert [file.source for file in list_corpus_files(settings)] == ["web", "code"]


def test_listing_of_one_file_in_two_sources_names_both(folder: Path) -> None:
    settings = CorpusSettings(sources={"web": [f"{folder}/b.jsonl"], "code": [f"{folder}/*"]})
    with pytest.raises(ConfigError, match=r"b\.jsonl': expected in one source, found in 'web' and 'code'"):
        list_corpus_files(settings)


@pytest.mark.parametrize("pattern", ["*.csv", "missing.jsonl", "sub"])
def test_listing_of_a_pattern_without_files_names_it(folder: Path, pattern: str) -> None:
    with pytest.raises(ConfigError, match="expected at least one file, found none"):
        list_corpus_files(CorpusSettings(files=[f"{folder}/b.jsonl", f"{folder}/{pattern}"]))


def test_listing_of_a_name_with_brackets_takes_it_literally_where_no_glob_matches(tmp_path: Path) -> None:
    (tmp_path / "part[1].jsonl").write_bytes(b"{}")
    (file,) = list_corpus_files(CorpusSettings(files=[f"{tmp_path}/part[1].jsonl"]))
    assert file.bytes == 2


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "simplecache::memory://x"])
def test_listing_of_an_unusable_url_says_what_is_expected(url: str) -> None:
    with pytest.raises(ConfigError, match="expected a p"):
        list_corpus_files(CorpusSettings(files=[url]))


def test_listing_of_compressed_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    with pytest.raises(ConfigError, match="expected a plain Parquet file"):
        list_corpus_files(CorpusSettings(files=[f"{tmp_path}/*"]))


def test_listing_of_a_url_keeps_the_url() -> None:
    fsspec.filesystem("memory").pipe_file("/listing/a.jsonl", b"{}\n")
    (file,) = list_corpus_files(CorpusSettings(files=["memory://listing/*.jsonl"]))
    assert (file.path, file.bytes, file.format) == ("memory:///listing/a.jsonl", 3, "jsonl")


def test_fingerprint_sees_size_and_both_ends_and_not_the_path(tmp_path: Path) -> None:
    content = bytearray(300_000)
    prints = []
    for name, change in (("a", None), ("b", None), ("first", 0), ("last", -1), ("middle", 150_000)):
        changed = bytearray(content)
        if change is not None:
            changed[change] = 1
        (tmp_path / name).write_bytes(changed)
    (tmp_path / "longer").write_bytes(bytes(300_001))
    (tmp_path / "zero").write_bytes(b"")
    prints = {Path(f.path).name: f.fingerprint for f in list_corpus_files(CorpusSettings(files=[f"{tmp_path}/*"]))}
    assert prints["a"] == prints["b"] == prints["middle"]
    assert len({prints[name] for name in ("a", "first", "last", "longer", "zero")}) == 5


def test_corpus_file_survives_json(folder: Path) -> None:
    (file,) = list_corpus_files(CorpusSettings(files=[f"{folder}/b.jsonl"]))
    assert CorpusFile.model_validate_json(file.model_dump_json()) == file


@pytest.mark.parametrize(
    "values",
    [{}, {"files": ["a"], "sources": {"b": ["c"]}}, {"files": []}, {"sources": {}}, {"sources": {"a": []}}],
)
def test_settings_without_exactly_one_list_of_files_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"corpus: 1 setting\(s\) cannot be used"):
        build_settings(CorpusSettings, values, where="corpus")


@pytest.mark.parametrize(
    ("name", "expected"), [("ClientConnectionError", OutsideError), ("NoCredentialsError", ConfigError)]
)
def test_reading_translates_errors_that_are_no_os_errors(name: str, expected: type[Exception]) -> None:
    with pytest.raises(expected, match=r"s3://bucket/a\.jsonl"), reading("s3://bucket/a.jsonl"):
        raise type(name, (Exception,), {})("no answer")


def test_reading_lets_a_bug_through() -> None:
    with pytest.raises(TypeError, match="a bug"), reading("s3://bucket/a.jsonl"):
        raise TypeError("a bug")


@pytest.mark.parametrize("url", ["ftp://user:hunter2@host/*.jsonl", "https://host/a.jsonl?token=hunter2"])
def test_listing_of_a_url_with_a_secret_is_refused_without_printing_it(url: str) -> None:
    with pytest.raises(ConfigError, match="expected a URL without secrets") as raised:
        list_corpus_files(CorpusSettings(files=[url]))
    assert "hunter2" not in str(raised.value)
