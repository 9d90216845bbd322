"""`logitstore verify` and `gc`: damage is found and named, mending says what it did, nothing is deleted unasked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from logitstore.store.files import StoreFiles


def find_shard(url: str, unit: int) -> Path:
    [path] = Path(url, "data").glob(f"{unit:07d}-*.parquet")
    return path


def test_verify_whole_store_ends_with_0(small_store_url: str, logitstore: Any) -> None:
    check = logitstore.json("verify", small_store_url)
    assert (check["is_clean"], check["units"], check["records"], check["problems"]) == (True, 3, 60, [])
    assert "every byte of every shard" in logitstore("verify", small_store_url)[0]


def test_verify_flipped_byte_names_shard_row_group_and_unit_and_ends_with_3(
    small_store_url: str, logitstore: Any, flip: Callable[[Path, int], None]
) -> None:
    path = find_shard(small_store_url, 1)
    flip(path, 200)
    check = logitstore.json("verify", small_store_url, exit_code=3)
    assert {(problem["path"], problem["unit"]) for problem in check["problems"]} == {(f"data/{path.name}", 1)}
    assert check["problems"][0]["what"].startswith("row group 0: the bytes are not")
    stdout, _ = logitstore("verify", small_store_url, exit_code=3)
    assert f"data/{path.name}: row group 0" in stdout
    assert "→ run 'logitstore verify" in stdout
    assert path.exists()


def test_verify_quick_does_not_read_shards(
    small_store_url: str, logitstore: Any, flip: Callable[[Path, int], None]
) -> None:
    flip(find_shard(small_store_url, 1), 200)
    assert logitstore.json("verify", small_store_url, "--quick")["is_clean"]
    find_shard(small_store_url, 2).unlink()
    check = logitstore.json("verify", small_store_url, "--quick", exit_code=3)
    assert [problem["unit"] for problem in check["problems"]] == [2]


def test_repair_lists_the_units_to_capture_again_and_leaves_a_clean_store(
    small_store_url: str, logitstore: Any, flip: Callable[[Path, int], None]
) -> None:
    flip(find_shard(small_store_url, 1), 200)
    stdout, _ = logitstore("verify", small_store_url, "--repair")
    assert "To be captured again with 'logitstore capture': units 1." in stdout
    check = logitstore.json("verify", small_store_url)
    assert (check["is_clean"], check["units"], check["manifest"]) == (True, 2, 2)
    assert logitstore.json("status", small_store_url)["units_left"] == 1


def test_repair_of_a_whole_store_changes_nothing(small_store_url: str, logitstore: Any) -> None:
    before = sorted(Path(small_store_url).rglob("*"))
    check = logitstore.json("verify", small_store_url, "--repair")
    assert (check["is_repaired"], check["manifest"]) == (False, 1)
    assert sorted(Path(small_store_url).rglob("*")) == before


@pytest.fixture
def orphan(small_store_url: str) -> Path:
    """A shard that nothing refers to, two days old."""
    StoreFiles(small_store_url).put("data/0000001-deadbeef.parquet", b"left by a killed attempt")
    path = Path(small_store_url, "data/0000001-deadbeef.parquet")
    age = path.stat().st_mtime - 48 * 3600
    os.utime(path, (age, age))
    return path


def test_gc_unasked_lists_and_deletes_nothing(orphan: Path, small_store_url: str, logitstore: Any) -> None:
    before = sorted(Path(small_store_url).rglob("*"))
    stdout, _ = logitstore("gc", small_store_url)
    assert f"data/{orphan.name}" in stdout
    assert "Nothing was deleted" in stdout
    found = logitstore.json("gc", small_store_url)
    assert found["files"] == [{"path": f"data/{orphan.name}", "bytes": orphan.stat().st_size}]
    assert found["deleted"] is False
    assert sorted(Path(small_store_url).rglob("*")) == before


def test_gc_within_the_grace_period_lists_nothing(orphan: Path, small_store_url: str, logitstore: Any) -> None:
    assert logitstore.json("gc", small_store_url, "--grace-hours", 72)["files"] == []
    assert orphan.exists()


def test_gc_asked_to_delete_deletes_the_orphan_alone(orphan: Path, small_store_url: str, logitstore: Any) -> None:
    stdout, _ = logitstore("gc", small_store_url, "--delete")
    assert "Deleted 1 file" in stdout
    assert not orphan.exists()
    assert logitstore.json("verify", small_store_url)["is_clean"]
