"""What only a real S3 server shows: stale listings, ranges beyond the end, folders as objects, refused keys."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from made_up import build_plan
from s3_server import BUCKET, S3Server

from logitstore.errors import ConfigError
from logitstore.store.commit import COMMITS, build_commit_path, list_units
from logitstore.store.create_only import check_create_only, create_or_read_back
from logitstore.store.files import StoreFiles
from logitstore.store.plan import create_plan, read_plan

WRONG_SECRET = "hunter2hunter2"


@pytest.fixture
def files(s3_url: str) -> StoreFiles:
    return StoreFiles(s3_url)


@pytest.fixture
def other(s3_url: str) -> StoreFiles:
    """The same store seen by another process: nothing that the first one's client keeps is shared."""
    return StoreFiles(s3_url, {"skip_instance_cache": True})


def test_object_of_another_process_is_found_after_a_listing(files: StoreFiles, other: StoreFiles) -> None:
    files.put("commits/1", b"first")
    assert [file.name for file in files.list("commits")] == ["1"]
    other.put("commits/2", b"second")
    assert files.read("commits/2") == b"second"
    assert files.exists("commits/2")
    assert [file.name for file in files.list("commits")] == ["1", "2"]
    assert list(files.read_many(["commits/1", "commits/2"])) == [b"first", b"second"]


def test_create_lost_to_another_process_after_a_listing_is_settled(files: StoreFiles, other: StoreFiles) -> None:
    files.put("commits/1", b"first")
    files.list("commits")
    other.put("commits/2", b"theirs")
    assert not create_or_read_back(files, "commits/2", b"ours")


@pytest.mark.slow
def test_listing_of_more_than_one_page_is_complete(files: StoreFiles) -> None:
    names = [f"{number:04d}" for number in range(1005)]  # S3 lists 1,000 at a time
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: files.put(f"commits/{name}", b"x"), names))
    assert [file.name for file in files.list("commits")] == names


def test_whole_read_takes_one_request(files: StoreFiles, requests: list[str]) -> None:
    files.put("plan.json", b"plan")
    requests.clear()
    assert files.read("plan.json") == b"plan"
    assert requests == ["GET"]


def test_range_is_cut_where_the_object_ends(store_url: str) -> None:
    files = StoreFiles(store_url)
    files.put("data/x", b"0123456789")
    files.put("data/empty", b"")
    ranges = [(2, 5), (8, 12), (10, 12), (20, 30), (None, 3), (7, None), (None, None)]
    found = [files.read("data/x", start, stop) for start, stop in ranges]
    assert found == [b"234", b"89", b"", b"", b"012", b"789", b"0123456789"]
    assert files.read("data/empty") == b""
    with pytest.raises(FileNotFoundError):
        files.read("data/gone", 0, 1)


def test_listing_leaves_out_what_stands_for_the_folder_itself(files: StoreFiles) -> None:
    files._fs.call_s3("put_object", Bucket=BUCKET, Key=f"{files.url.removeprefix(f's3://{BUCKET}/')}/{COMMITS}/")
    assert files.list(COMMITS) == []
    files.put(build_commit_path(1), b"x")
    assert list_units(files, COMMITS) == [1]


def test_storage_probe_accepts_a_server_with_create_only(files: StoreFiles) -> None:
    check_create_only(files)
    assert files.list("probe") == []


@pytest.mark.parametrize("use", [
    lambda files, _: read_plan(files),
    lambda files, _: create_plan(files, build_plan(1)),
    lambda files, _: create_or_read_back(files, "commits/1", b"x"),
    lambda files, _: files.list("commits"),
    lambda files, _: files.exists("plan.json"),
    lambda files, _: files.delete("plan.json"),
    lambda files, source: files.put_file("data/x", source),
], ids=["read", "plan", "create", "list", "exists", "delete", "upload"])  # fmt: skip
@pytest.mark.parametrize("is_key_known", [True, False], ids=["wrong secret", "unknown key"])
def test_refused_key_is_a_settings_error_after_one_request(
    s3_url: str,
    s3_server: S3Server,
    requests: list[str],
    tmp_path: Path,
    use: Callable[[StoreFiles, Path], object],
    is_key_known: bool,
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    files = StoreFiles(s3_url, {"key": s3_server.key if is_key_known else "nobody", "secret": WRONG_SECRET})
    with pytest.raises(ConfigError, match=r"access denied.*check the credentials") as raised:
        use(files, source)
    assert raised.value.exit_code == 2
    assert len(requests) == 1
    assert WRONG_SECRET not in f"{raised.value!r} {raised.value.__cause__!r}"
