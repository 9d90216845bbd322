"""`logitstore inspect` and `status`: what they say of whole, growing and damaged stores."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkout import ROOT

from logitstore.store.commit import QuarantinedUnit, quarantine_unit
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore

TEXT = "def read(path):\n    return open(path).read()  # naïve\n"


def list_shards(files: StoreFiles) -> list[Path]:
    return sorted(Path(files.url, "data").iterdir())


def test_inspect_json_counts_every_byte_of_the_store(build_store: Callable[..., LogitStore], logitstore: Any) -> None:
    store = build_store()
    found = logitstore.json("inspect", store.url)
    on_disk = sum(path.stat().st_size for path in Path(store.url).rglob("*") if path.is_file())
    positions = sum(record.num_positions for record in store)
    assert (found["records"], found["positions"], found["manifest"]) == (len(store), positions, 1)
    assert found["bytes"] == on_disk == sum(found["columns"].values()) + found["other_bytes"]
    assert found["bytes_per_position"] == pytest.approx(on_disk / positions)
    assert found["teacher"]["model"] == "made-up"
    assert (found["method"]["k"], found["codec"], found["dead_letters"]) == (8, "float32", {})
    assert set(found["columns"]) >= {"token_ids", "support_ids", "support_logprobs", "entropy"}


def test_inspect_json_means_are_those_of_the_records(build_store: Callable[..., LogitStore], logitstore: Any) -> None:
    store = build_store(sources=("train", "test"))
    found = logitstore.json("inspect", store.url)
    entropy = np.concatenate([record.signal.entropy for record in store]).astype(np.float64)
    logprobs = np.concatenate([record.signal.next_token_logprob for record in store]).astype(np.float64)
    tails = np.exp(np.concatenate([record.signal.tail_logprob for record in store]).astype(np.float64))
    assert found["mean_entropy"] == pytest.approx(entropy.mean())
    assert found["teacher_loss"] == pytest.approx(-logprobs.mean())
    assert found["teacher_perplexity"] == pytest.approx(math.exp(-logprobs.mean()))
    assert found["mean_tail_mass"] == pytest.approx(tails.mean())
    assert found["mean_support"] == pytest.approx(sum(len(r.signal.support_ids) for r in store) / len(entropy))
    assert sum(found["entropy_histogram"]) == sum(found["tail_histogram"]) == len(entropy)
    assert [source["name"] for source in found["sources"]] == ["test", "train"]
    assert sum(source["positions"] for source in found["sources"]) == len(entropy)


def test_inspect_for_people_shows_costs_histograms_and_sources(
    build_store: Callable[..., LogitStore], logitstore: Any
) -> None:
    store = build_store(sources=("train", "test"))
    stdout, stderr = logitstore("inspect", store.url)
    for part in ("made-up", "top-k, k = 8", "Where the bytes are", "support_logprobs", "perplexity", "█", "test"):
        assert part in stdout
    assert stderr == ""


def test_inspect_growing_store_shows_what_no_manifest_lists_yet(growing_store: StoreFiles, logitstore: Any) -> None:
    found = logitstore.json("inspect", growing_store.url)
    assert (found["units"], found["units_planned"], found["records"]) == (3, 4, 60)
    assert (found["manifest"], found["newer_units"]) == (None, 1)
    assert found["dead_letters"] == {"empty": 1}
    pinned = logitstore.json("inspect", growing_store.url, "--manifest", 1)
    assert (pinned["units"], pinned["records"], pinned["manifest"], pinned["newer_units"]) == (2, 40, 1, 0)
    assert "1 unit newer than the last manifest" in logitstore("inspect", growing_store.url)[0]


def test_inspect_store_without_a_manifest_or_any_unit_works(growing_store: StoreFiles, logitstore: Any) -> None:
    Path(growing_store.url, "manifest-000001.parquet").unlink()
    assert logitstore.json("inspect", growing_store.url)["records"] == 60
    for path in Path(growing_store.url, "commits").iterdir():
        path.unlink()
    assert logitstore.json("inspect", growing_store.url)["positions"] == 0
    assert "0 of 4 committed" in logitstore("inspect", growing_store.url)[0]


def test_inspect_missing_manifest_is_named_with_those_there_are(growing_store: StoreFiles, logitstore: Any) -> None:
    _, stderr = logitstore("inspect", growing_store.url, "--manifest", 7, exit_code=2)
    assert "expected manifest 7, found manifests [1]" in stderr


def test_inspect_store_with_a_damaged_plan_ends_with_3_and_names_it(growing_store: StoreFiles, logitstore: Any) -> None:
    Path(growing_store.url, "plan.json").write_bytes(b"{ damaged")
    stdout, stderr = logitstore("inspect", growing_store.url, "--json", exit_code=3)
    assert stdout == ""
    assert "plan.json" in stderr


@pytest.mark.parametrize(
    ("paths", "records", "newer_units"),
    [
        (["manifest-000001.parquet"], 60, 3),
        (["commits/0000002.json"], 40, 0),
        (["manifest-000001.parquet", "commits/0000000.json"], 40, 2),
    ],
)
def test_inspect_damaged_store_shows_what_is_whole_names_the_rest_and_ends_with_3(
    paths: list[str], records: int, newer_units: int, growing_store: StoreFiles, logitstore: Any
) -> None:
    for path in paths:
        Path(growing_store.url, path).write_bytes(b"{ damaged")
    found = logitstore.json("inspect", growing_store.url, exit_code=3)
    assert (found["records"], found["newer_units"]) == (records, newer_units)
    assert len(found["unreadable"]) == len(paths)
    _, stderr = logitstore("inspect", growing_store.url, exit_code=3)
    for path, trouble in zip(paths, found["unreadable"], strict=True):
        assert path in trouble
        assert f"not counted: {trouble.splitlines()[0]}" in stderr


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        (["--min-entropy", 2.0], lambda p: p["entropy"] >= 2.0),
        (["--min-surprise", 1.5], lambda p: -math.log(p["next_token_probability"]) >= 1.5),
        (["--matching", "^ ?[a-f]"], lambda p: re.search("^ ?[a-f]", p["next_token"])),
        (["--min-entropy", 1.0, "--matching", "e", "--positions", "2:9"], None),
        (["--min-surprise", 1000], lambda p: False),
    ],
)
def test_positions_are_chosen_by_what_is_asked_for(
    options: list[Any], passes: Any, text_store: Callable[..., StoreFiles], logitstore: Any
) -> None:
    url = text_store(TEXT).url
    every = logitstore.json("inspect", url, "--record", 0, "--positions", "0:")["positions"]
    view = logitstore.json("inspect", url, "--record", 0, *options)
    if passes is None:
        every = every[2:9]
        passes = lambda p: p["entropy"] >= 1.0 and "e" in p["next_token"]  # noqa: E731
    expected = [position for position in every if passes(position)]
    assert view["positions"] == expected
    assert (view["searched"], view["found"]) == (len(every), len(expected))
    assert (
        f"{len(expected)} of {len(every)} that were searched" in logitstore("inspect", url, "--record", 0, *options)[0]
    )


def test_pattern_that_is_none_and_one_without_text_are_refused(
    growing_store: StoreFiles, text_store: Callable[..., StoreFiles], logitstore: Any
) -> None:
    _, stderr = logitstore("inspect", text_store(TEXT).url, "--record", 0, "--matching", "(", exit_code=2)
    assert "expected a regular expression" in stderr
    _, stderr = logitstore("inspect", growing_store.url, "--record", 0, "--matching", "a", exit_code=2)
    assert "expected a tokenizer to have text to match" in stderr
    _, stderr = logitstore("inspect", growing_store.url, "--min-entropy", 1, exit_code=2)
    assert "expected --record beside them" in stderr


def test_record_of_a_shard_is_that_of_its_store(growing_store: StoreFiles, logitstore: Any, tmp_path: Path) -> None:
    path = list_shards(growing_store)[1]
    of_store = logitstore.json("inspect", growing_store.url, "--record", "1/17", "--positions", "0:")
    of_shard = logitstore.json("inspect", path, "--record", "17", "--positions", "0:")
    assert of_shard == {**of_store, "store": str(path)}
    moved = tmp_path / "moved.parquet"
    moved.write_bytes(path.read_bytes())
    alone = logitstore.json("inspect", moved, "--record", "1/17", "--positions", "0:")
    assert (alone["positions"], alone["source"]) == (of_store["positions"], None)
    assert "--tokenizer FOLDER names one" in alone["tokenizer_trouble"]
    for record, complaint in (("20", "1/0 to 1/19"), ("2/1", "1/0 to 1/19"), ("x", "expected N or UNIT/INDEX")):
        assert complaint in logitstore("inspect", path, "--record", record, exit_code=2)[1]


def test_record_of_a_damaged_shard_ends_with_3(
    growing_store: StoreFiles, logitstore: Any, flip: Callable[[Path, int], None]
) -> None:
    path = list_shards(growing_store)[0]
    flip(path, 300)
    assert "row group 0" in logitstore("inspect", path, "--record", 0, exit_code=3)[1]


def test_text_of_a_shards_record_is_found_through_its_store_or_a_tokenizer(
    text_store: Callable[..., StoreFiles], teacher_folder: Path, tmp_path: Path, logitstore: Any
) -> None:
    [path] = list_shards(text_store(TEXT))
    moved = tmp_path / "moved.parquet"
    moved.write_bytes(path.read_bytes())
    for arguments in ((path,), (moved, "--tokenizer", teacher_folder)):
        view = logitstore.json("inspect", *arguments, "--record", 0, "--positions", "0:")
        assert "".join(piece["text"] for piece in view["text"]) == TEXT


def test_dead_letters_are_listed_with_unit_place_and_reason(growing_store: StoreFiles, logitstore: Any) -> None:
    found = logitstore.json("inspect", growing_store.url, "--dead-letters")
    [letter] = found["dead_letters"]
    assert (letter["unit"], letter["reason"], letter["document_id"]) == (1, "empty", "/corpus/1.txt@17")
    assert "line 2, byte 17" in logitstore("inspect", growing_store.url, "--dead-letters")[0]
    assert found["counts"] == {"empty": 1}


def test_record_in_text_reads_like_the_document(text_store: Callable[..., StoreFiles], logitstore: Any) -> None:
    view = logitstore.json("inspect", text_store(TEXT).url, "--record", 0, "--positions", "0:", "--top", 3)
    positions = view["positions"]
    assert "".join(piece["text"] for piece in view["text"]) == TEXT
    assert [piece["entropy"] for piece in view["text"][:3]] == [None, *(p["entropy"] for p in positions[:2])]
    assert positions[0]["token"] + positions[0]["next_token"] == "def read"
    assert len(positions) == view["num_positions"]
    assert all(len(position["candidates"]) == 3 for position in positions)
    sure = positions[1]
    assert (sure["next_token_slot"], sure["candidates"][0]["is_next"]) == (0, True)
    assert sure["next_token_probability"] == pytest.approx(sure["candidates"][0]["probability"])
    assert sure["candidates"][0]["probability"] > 0.9
    assert [position["is_taught"] for position in positions[:2]] == [False, True]


def test_record_for_people_marks_what_came_next(text_store: Callable[..., StoreFiles], logitstore: Any) -> None:
    stdout, _ = logitstore("inspect", text_store(TEXT).url, "--record", "0/0")
    assert TEXT.splitlines()[0] in stdout
    assert "read.py (tokens 0 to" in stdout
    assert "from its token 5" in stdout
    assert "▸" in stdout
    assert "not taught" in stdout


def test_record_without_its_tokenizer_shows_ids_and_says_why(
    text_store: Callable[..., StoreFiles], logitstore: Any, teacher_folder: Path
) -> None:
    url = text_store(TEXT, model="/gone/teacher").url
    view = logitstore.json("inspect", url, "--record", 0)
    assert view["positions"][0]["token"] is None
    assert "not on this machine" in view["tokenizer_trouble"]
    assert str(view["positions"][0]["next_token_id"]) in logitstore("inspect", url, "--record", 0)[0]
    named = logitstore.json("inspect", url, "--record", 0, "--tokenizer", teacher_folder)
    assert named["positions"][0]["token"] is not None


def test_record_with_another_tokenizer_shows_ids(text_store: Callable[..., StoreFiles], logitstore: Any) -> None:
    view = logitstore.json("inspect", text_store(TEXT, tokenizer_fingerprint="0" * 64).url, "--record", 0)
    assert view["tokenizer"] is None
    assert "not the one that the store was captured with" in view["tokenizer_trouble"]


@pytest.mark.parametrize("record", ["60", "3/0", "0/20"])
def test_record_that_is_not_there_ends_with_2(record: str, growing_store: StoreFiles, logitstore: Any) -> None:
    _, stderr = logitstore("inspect", growing_store.url, "--record", record, exit_code=2)
    assert f"no record {record}" in stderr


@pytest.mark.parametrize(
    "arguments", [["--record", "first"], ["--record", "0", "--positions", "9:3"], ["--record", "0", "--positions", "a"]]
)
def test_record_asked_for_in_other_words_ends_with_2(
    arguments: list[str], growing_store: StoreFiles, logitstore: Any
) -> None:
    _, stderr = logitstore("inspect", growing_store.url, *arguments, exit_code=2)
    assert "expected" in stderr


def test_record_with_damaged_bytes_ends_with_3(
    growing_store: StoreFiles, logitstore: Any, flip: Callable[[Path, int], None]
) -> None:
    flip(list_shards(growing_store)[0], 100)
    _, stderr = logitstore("inspect", growing_store.url, "--record", "0", exit_code=3)
    assert "row group 0" in stderr


def test_shard_by_itself_shows_header_and_columns(growing_store: StoreFiles, logitstore: Any) -> None:
    path = list_shards(growing_store)[1]
    shard = logitstore.json("inspect", path)
    records = [record for record in LogitStore.open(growing_store.url, "live") if record.address.unit == 1]
    assert (shard["header"]["unit"], shard["records"]) == (1, 20)
    assert shard["positions"] == sum(record.num_positions for record in records)
    assert shard["support_entries"] == sum(len(record.signal.support_ids) for record in records)
    assert shard["bytes"] == path.stat().st_size
    assert "next_token_logprob" in logitstore("inspect", path)[0]


def test_shard_by_a_relative_name_is_found(
    growing_store: StoreFiles, logitstore: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = list_shards(growing_store)[0]
    monkeypatch.chdir(path.parent)
    assert logitstore.json("inspect", path.name)["header"]["unit"] == 0


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 1000])
def test_file_that_is_no_shard_ends_with_3(content: bytes, tmp_path: Path, logitstore: Any) -> None:
    (tmp_path / "no.parquet").write_bytes(content)
    _, stderr = logitstore("inspect", tmp_path / "no.parquet", exit_code=3)
    assert "expected" in stderr


def test_manifest_shown_as_a_shard_ends_with_3(growing_store: StoreFiles, logitstore: Any) -> None:
    _, stderr = logitstore("inspect", f"{growing_store.url}/manifest-000001.parquet", exit_code=3)
    assert "without its header" in stderr


def test_status_of_a_growing_store_counts_units_and_changes_nothing(growing_store: StoreFiles, logitstore: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(growing_store.url).rglob("*")}
    quarantine_unit(growing_store, QuarantinedUnit(unit=3, attempts=3, error="TeacherError: NaN"))
    status = logitstore.json("status", growing_store.url)
    assert (status["units_planned"], status["units_committed"], status["units_quarantined"]) == (4, 3, 1)
    assert (status["units_left"], status["is_complete"]) == (0, False)
    assert (status["manifest"], status["units_not_in_manifest"]) == (1, 1)
    assert status["dead_letters"] == {"empty": 1}
    assert status["records"] == 60
    assert status["newest_commit_age_seconds"] >= 0
    stdout, _ = logitstore("status", growing_store.url)
    assert "TeacherError: NaN" in stdout
    assert "--retry-quarantined" in stdout
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path for path in before if before[path] != after[path]} <= {Path(growing_store.url)}


def test_status_of_a_whole_store_says_that_it_is_complete(small_store_url: str, logitstore: Any) -> None:
    status = logitstore.json("status", small_store_url)
    assert (status["is_complete"], status["units_left"], status["seconds_left"]) == (True, 0, None)


def test_labels_are_shown_with_the_store_and_with_its_records(logitstore: Any) -> None:
    golden = ROOT / "tests/store/golden/version-1/labelled-compact/store"
    assert logitstore.json("inspect", golden)["label_field"] == "language"
    assert "labels from 'language'" in logitstore("inspect", golden)[0]
    shown = [logitstore.json("inspect", golden, "--record", n)["documents"] for n in range(6)]
    assert shown == [
        [{name: getattr(span, name) for name in ("document_id", "start", "document_offset", "label")} for span in spans]
        for spans in (record.documents for record in islice(LogitStore.open(str(golden)), 6))
    ]
    place = next(n for n, spans in enumerate(shown) if spans[0]["label"] == "de")
    assert "label de)" in logitstore("inspect", golden, "--record", place)[0]
