"""What object stores have in common and their clients tell each in its own way."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cloud_emulators import CONTAINER
from made_up import build_plan
from s3_server import BUCKET

from logitstore.errors import ConfigError, StoreNotFoundError
from logitstore.storage_clients import UPLOAD_PART_BYTES, UPLOADED_PARTS_AT_ONCE
from logitstore.store.create_only import check_create_only, create_or_read_back
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.plan import create_plan

# aiohttp's advice to its callers about bodies above a megabyte; Google's and Azure's clients do not follow it.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")
ON_OBJECT_STORES = pytest.mark.parametrize("store_url", ["s3", "gcs", "azure"], indirect=True)
assert CONTAINER == BUCKET  # one name, so that tests can put another in its place


@ON_OBJECT_STORES
def test_bucket_that_is_not_there_is_a_clear_error(store_url: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    url = store_url.replace(f"://{BUCKET}/", "://no-such-bucket/")
    files = StoreFiles(url)
    with pytest.raises(StoreNotFoundError, match=r"expected a store, found no plan\.json; check the address"):
        LogitStore.open(url)
    writes: list[Callable[[], object]] = [
        lambda: create_plan(files, build_plan(1)),
        lambda: files.put("data/x", b"x"),
        lambda: files.put_file("data/x", source),
    ]
    for write in writes:
        with pytest.raises(ConfigError, match="create the bucket or correct the address") as raised:
            write()
        assert raised.value.exit_code == 2


@ON_OBJECT_STORES
def test_storage_keeps_the_promise_of_create_only(store_url: str) -> None:
    files = StoreFiles(store_url)
    check_create_only(files)
    assert files.list("probe") == []
    assert create_or_read_back(files, "plan.json", b"ours")
    assert not create_or_read_back(files, "plan.json", b"theirs")
    assert files.read("plan.json") == b"ours"


@ON_OBJECT_STORES
def test_listing_shows_at_once_what_another_process_wrote_and_deleted(store_url: str) -> None:
    files, other = StoreFiles(store_url), StoreFiles(store_url, {"skip_instance_cache": True})
    assert files.list("commits") == []
    other.put("commits/1", b"one")
    other.put("commits/2", b"two")
    assert [(file.name, file.bytes) for file in files.list("commits")] == [("1", 3), ("2", 3)]
    assert all(file.modified and file.modified > 1.7e9 for file in files.list("commits"))
    other.delete("commits/1")
    assert [file.name for file in files.list("commits")] == ["2"]
    assert not files.exists("commits/1")
    files.delete("commits/1")


@pytest.mark.slow
@ON_OBJECT_STORES
def test_shard_of_several_parts_is_stored_whole(store_url: str, tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(3 * UPLOAD_PART_BYTES + 12_345)
    source = tmp_path / "shard"
    source.write_bytes(data)
    files = StoreFiles(store_url)
    for _ in range(2):  # as a capture does whose first answer was lost
        files.put_file("data/shard", source)
        assert [file.bytes for file in files.list("data")] == [len(data)]
        assert hashlib.sha256(files.read("data/shard")).digest() == hashlib.sha256(data).digest()
    border = UPLOAD_PART_BYTES
    assert files.read("data/shard", border - 3, border + 3) == data[border - 3 : border + 3]


@pytest.mark.slow
@ON_OBJECT_STORES
def test_large_shard_is_never_in_memory_whole(store_url: str, tmp_path: Path) -> None:
    source, num_bytes = tmp_path / "large", 16 * UPLOAD_PART_BYTES
    with source.open("wb") as file:
        file.truncate(num_bytes)
    files = StoreFiles(store_url)
    tracemalloc.start()
    try:
        files.put_file("data/large", source)
        most_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most_bytes < 2.5 * UPLOADED_PARTS_AT_ONCE * UPLOAD_PART_BYTES < 0.7 * num_bytes
    assert [file.bytes for file in files.list("data")] == [num_bytes]


def test_wrong_key_of_azure_is_a_settings_error(azure_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong = "AZURE_STORAGE_CONNECTION_STRING", base64.b64encode(b"hunter2" * 5).decode()
    right = dict(part.split("=", 1) for part in os.environ[name].strip(";").split(";"))["AccountKey"]
    monkeypatch.setenv(name, os.environ[name].replace(right, wrong))
    files = StoreFiles(azure_url, {"skip_instance_cache": True})
    for use in (lambda: files.read("plan.json"), lambda: files.put("data/x", b"x"), lambda: files.list("commits")):
        with pytest.raises(ConfigError, match=r"access denied(?s:.)*check the credentials") as raised:
            use()
        assert wrong not in f"{raised.value!r} {raised.value.__cause__!r}"


def test_refusals_of_gcs_are_not_printed_as_tracebacks(
    gcs_url: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a program that set up none
    files = StoreFiles(gcs_url)
    files.put("data/x", b"0123456789")
    assert files.read("data/x", 20, 30) == b""
    assert capfd.readouterr().err == ""
