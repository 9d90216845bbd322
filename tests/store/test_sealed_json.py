"""Seals on plans and commits: every flipped bit is noticed, and the object stays plain JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from made_up import build_plan, build_records, put_shard

from logitstore.errors import CorruptShardError, IncompatibleStoreError
from logitstore.store.commit import QuarantinedUnit, build_commit_path, commit_unit, quarantine_unit, read_quarantine
from logitstore.store.files import StoreFiles
from logitstore.store.manifest import take_snapshot, write_manifest
from logitstore.store.plan import PLAN_PATH, create_plan, read_plan
from logitstore.store.repair import repair_store
from logitstore.store.sealed_json import BrokenSealError, seal, unseal
from logitstore.store.verify import verify_store


@pytest.fixture
def files(tmp_path: Path) -> StoreFiles:
    """A store with a plan, a commit, a quarantine record and a manifest."""
    return fill(StoreFiles(str(tmp_path / "store")), tmp_path)


@pytest.fixture
def stored(store_url: str, tmp_path: Path) -> StoreFiles:
    """The same store on every kind of storage."""
    return fill(StoreFiles(store_url), tmp_path)


def fill(files: StoreFiles, tmp_path: Path) -> StoreFiles:
    plan = create_plan(files, build_plan(2))
    commit_unit(files, put_shard(files, plan, 0, build_records(2), "a", tmp_path))
    quarantine_unit(files, QuarantinedUnit(unit=1, attempts=3, error="it failed"))
    write_manifest(files, plan.compute_fingerprint())
    return files


def test_sealed_object_is_plain_json_with_its_digest() -> None:
    sealed = seal(b'{"a": 1}')
    assert json.loads(sealed).keys() == {"sha256", "a"}
    assert unseal(sealed) == b'{"a": 1}'


def test_every_flipped_bit_breaks_the_seal() -> None:
    sealed = seal(b'{"unit":7,"attempt":"abc"}')
    for bit in range(8 * len(sealed)):
        flipped = bytearray(sealed)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BrokenSealError):
            unseal(bytes(flipped))


@pytest.mark.parametrize(
    ("path", "read"),
    [
        (PLAN_PATH, read_plan),
        (build_commit_path(0), lambda files: take_snapshot(files, read_plan(files).compute_fingerprint(), None)),
        ("quarantine/0000001.json", read_quarantine),
    ],
)
def test_bits_flipped_all_over_an_object_are_errors_that_name_it(
    path: str, read: Callable[[StoreFiles], object], files: StoreFiles
) -> None:
    whole = files.read(path)
    for place in range(0, len(whole), 13):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place // 13 % 8)
        files.put(path, bytes(flipped))
        with pytest.raises((CorruptShardError, IncompatibleStoreError), match=path.replace(".", r"\.")) as caught:
            read(files)
        assert "install a logitstore" not in str(caught.value)
    files.put(path, whole)
    read(files)


def test_commit_with_a_changed_count_is_found_by_verify_though_it_still_adds_up(stored: StoreFiles) -> None:
    path = build_commit_path(0)
    text = stored.read(path).decode()
    assert '"documents":2,"recorded_documents":2' in text
    changed = text.replace('"documents":2,"recorded_documents":2', '"documents":3,"recorded_documents":3')
    stored.put(path, changed.encode())
    [problem] = verify_store(stored).problems
    assert (problem.unit, problem.path) == (0, path)
    assert "not the ones that were written" in problem.what


def test_commit_whose_version_flipped_is_damaged_and_repaired(stored: StoreFiles) -> None:
    path = build_commit_path(0)
    stored.put(path, stored.read(path).replace(b'"format_version":1', b'"format_version":0'))
    verification = verify_store(stored)
    assert [problem.unit for problem in verification.problems] == [0]
    assert repair_store(stored, verification) == [0]


def test_damaged_quarantine_record_is_found_by_verify(stored: StoreFiles) -> None:
    stored.put("quarantine/0000001.json", b"{}")
    [problem] = verify_store(stored).problems
    assert (problem.path, problem.unit) == ("quarantine/0000001.json", None)
    assert "delete it" in problem.what_to_do


def test_commit_damaged_on_the_way_is_read_once_more(stored: StoreFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    read, path = StoreFiles.read, build_commit_path(0)
    reads: list[str] = []

    def flip_first(self: StoreFiles, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        data = read(self, name, start, stop)
        reads.append(name)
        return data.replace(b'"documents":2', b'"documents":9') if reads.count(name) == 1 and name == path else data

    fingerprint = read_plan(stored).compute_fingerprint()
    monkeypatch.setattr(StoreFiles, "read", flip_first)
    assert take_snapshot(stored, fingerprint, None).units.tolist() == [0]
    reads.clear()
    assert verify_store(stored).is_clean
    with monkeypatch.context() as patched:
        patched.setattr(StoreFiles, "read", lambda self, name, *_: read(self, name).replace(b":2,", b":3,"))
        with pytest.raises(CorruptShardError, match=r"0000000\.json"):
            take_snapshot(stored, fingerprint, None)


def test_shard_damaged_on_the_way_is_read_once_more_before_it_is_called_damaged(
    stored: StoreFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = StoreFiles.read
    damaged: list[str] = []

    def flip_first(self: StoreFiles, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        data = read(self, name, start, stop)
        if name.startswith("data/") and name not in damaged:
            damaged.append(name)
            return data[:100] + bytes([data[100] ^ 1]) + data[101:]
        return data

    monkeypatch.setattr(StoreFiles, "read", flip_first)
    assert verify_store(stored).is_clean
    assert damaged
