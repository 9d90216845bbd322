"""Uploads in parts over a wire that breaks: an object appears whole or not at all, and trying again works."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from fault_proxy import Fault, FaultProxy, Rule
from s3_server import BUCKET

from logitstore import storage_clients
from logitstore.errors import OutsideError
from logitstore.store.files import StoreFiles

PART_BYTES = 5 << 20  # the least that S3 takes
STEPS = {"start": ("POST", r"\?uploads$"), "part": ("PUT", r"partNumber=2\b"), "finish": ("POST", r"\?uploadId=[^&]*$")}


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shard") / "shard.parquet"
    path.write_bytes(np.random.default_rng(0).bytes(2 * PART_BYTES + 1000))
    return path


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_clients, "UPLOAD_PART_BYTES", PART_BYTES)


def is_whole(files: StoreFiles, shard: Path) -> bool:
    data = files.read("data/shard")
    return hashlib.sha256(data).digest() == hashlib.sha256(shard.read_bytes()).digest()


def list_unfinished_uploads(files: StoreFiles) -> list[str]:
    prefix = files.url.removeprefix(f"s3://{BUCKET}/")
    found = files._fs.call_s3("list_multipart_uploads", Bucket=BUCKET, Prefix=prefix)
    return [upload["Key"] for upload in found.get("Uploads", [])]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fault", ["refuse", "refuse_after", "reset", "lose_response"])
def test_upload_in_parts_with_a_fault_at_any_step_is_whole(
    wire: StoreFiles, proxy: FaultProxy, shard: Path, fault: Fault, step: str
) -> None:
    method, path = STEPS[step]
    rule = Rule(fault=fault, method=method, path=path, times=1)
    proxy.set(rule)
    wire.put_file("data/shard", shard)
    assert rule.hits == 1
    assert proxy.count("PUT", r"partNumber=[123]\b") >= 3
    proxy.set()
    assert is_whole(wire, shard)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fault", ["refuse", "reset"])
def test_upload_in_parts_that_fails_shows_nothing_and_may_be_tried_again(
    hasty_wire: StoreFiles, proxy: FaultProxy, shard: Path, fault: Fault, step: str
) -> None:
    method, path = STEPS[step]
    proxy.set(Rule(fault=fault, method=method, path=path))
    with pytest.raises(OutsideError, match=r"/data/shard: .*run the command again") as raised:
        hasty_wire.put_file("data/shard", shard)
    assert raised.value.exit_code == 4
    assert proxy.rules[0].hits > 0
    proxy.set()
    assert not hasty_wire.exists("data/shard")
    assert hasty_wire.list("data") == []
    assert list_unfinished_uploads(hasty_wire) == []
    hasty_wire.put_file("data/shard", shard)
    assert is_whole(hasty_wire, shard)


def test_upload_of_any_size_fits_into_the_parts_that_s3_allows(wire: StoreFiles) -> None:
    for num_bytes in (0, 1, 100 << 20, 10_000 * PART_BYTES, 10_000 * PART_BYTES + 1, 5 << 40):
        part = storage_clients.build_upload_options(wire._fs, num_bytes)["chunksize"]
        assert part % PART_BYTES == 0
        assert num_bytes <= 10_000 * part
