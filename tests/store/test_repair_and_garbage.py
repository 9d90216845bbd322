"""Repair and garbage collection: killed anywhere they leave a store that can be mended, and they spare what is used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from made_up import VOCAB_SIZE, build_plan, build_records, edit_sealed, put_shard

from logitstore.errors import CorruptShardError, IncompatibleStoreError
from logitstore.store.commit import (
    COMMITS,
    Commit,
    QuarantinedUnit,
    build_commit_path,
    commit_unit,
    list_units,
    quarantine_unit,
    read_commit,
)
from logitstore.store.files import StoreFiles
from logitstore.store.garbage import delete_garbage, find_garbage
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import list_manifests, read_manifest, write_manifest
from logitstore.store.plan import create_plan, read_plan
from logitstore.store.repair import repair_store
from logitstore.store.verify import verify_store


class KilledError(BaseException):
    """Stands for SIGKILL: no handler of the code under test may catch it."""


class DyingFiles(StoreFiles):
    """A store whose process dies before its n-th change."""

    def __init__(self, url: str, changes: int) -> None:
        super().__init__(url)
        self._changes_left = changes

    def _count(self) -> None:
        if self._changes_left == 0:
            raise KilledError
        self._changes_left -= 1

    def create(self, path: str, data: bytes) -> bool:
        self._count()
        return super().create(path, data)

    def delete(self, path: str) -> None:
        self._count()
        super().delete(path)


def put(files: StoreFiles, unit: int, attempt: str, folder: Path) -> Commit:
    records = build_records(4, unit=unit, vocab_size=VOCAB_SIZE)
    return put_shard(files, read_plan(files), unit, records, attempt, folder)


def capture_all(files: StoreFiles, attempt: str, folder: Path) -> None:
    plan = create_plan(files, build_plan(3))
    for unit in sorted({0, 1, 2} - set(list_units(files, COMMITS))):
        commit_unit(files, put(files, unit, attempt, folder))
    write_manifest(files, plan.compute_fingerprint())


@pytest.fixture
def files(tmp_path: Path) -> StoreFiles:
    files = StoreFiles(str(tmp_path / "store"))
    capture_all(files, "first", tmp_path)
    return files


@pytest.fixture
def stored(store_url: str, tmp_path: Path) -> StoreFiles:
    """The same store as `files`, on every kind of storage."""
    files = StoreFiles(store_url)
    capture_all(files, "first", tmp_path)
    return files


def flip(files: StoreFiles, path: str, place: int) -> None:
    data = bytearray(files.read(path))
    data[place] ^= 4
    files.put(path, bytes(data))


def damage_unit(files: StoreFiles, unit: int) -> None:
    flip(files, str(read_commit(files, unit).file), 500)


def read_units(files: StoreFiles) -> set[int]:
    return {record.address.unit for record in LogitStore.open(files.url)}


@pytest.mark.parametrize(
    "store_url",
    ["file", "memory", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("s3", "gcs", "azure"))],
    indirect=True,
)
def test_repair_killed_before_any_change_never_leaves_a_manifest_of_what_is_not_committed(
    store_url: str, tmp_path: Path
) -> None:
    for changes in range(10):
        url = f"{store_url}/{changes}"
        files = StoreFiles(url)
        capture_all(files, "first", tmp_path)
        damage_unit(files, 0)
        damage_unit(files, 2)
        found = verify_store(files)
        try:
            repair_store(DyingFiles(url, changes), found)
        except KilledError:
            has_finished = False
        else:
            has_finished = True
        assert set(read_manifest(files).units.tolist()) <= set(list_units(files, COMMITS))
        assert read_units(files) == {1} if changes else read_manifest(files).number == 1
        repair_store(files, verify_store(files))  # what the next one does
        capture_all(files, "second", tmp_path)
        assert verify_store(files).is_clean
        assert read_units(files) == {0, 1, 2}
        if has_finished:
            assert changes == 3
            return
    pytest.fail("the repair never finished")


def test_repair_mends_a_manifest_that_lists_an_attempt_whose_commit_was_replaced(
    files: StoreFiles, tmp_path: Path
) -> None:
    files.delete(build_commit_path(1))
    commit_unit(files, put(files, 1, "second", tmp_path))
    path = Path(files.url, build_commit_path(1))
    os.utime(path, (1, 1))  # so that times do not give it away
    assert [problem.what for problem in verify_store(files).problems] == ["its entries differ from the commits"]
    assert repair_store(files, verify_store(files)) == []
    assert verify_store(files).is_clean
    assert read_manifest(files).read_units("attempt")["attempt"].to_pylist() == ["first", "second", "first"]


def test_damaged_older_manifest_is_found_and_removed_by_repair(stored: StoreFiles) -> None:
    damage_unit(stored, 1)
    repair_store(stored, verify_store(stored))
    flip(stored, "manifest-000001.parquet", 4)
    flip(stored, "manifest-000001.parquet", -6)
    [problem] = verify_store(stored).problems
    assert (problem.path, problem.damaged_manifest) == ("manifest-000001.parquet", 1)
    repair_store(stored, verify_store(stored))
    assert list_manifests(stored) == [2]
    assert verify_store(stored).is_clean


def test_garbage_is_unknown_while_a_manifest_is_damaged_and_is_found_after_the_repair(
    stored: StoreFiles, tmp_path: Path
) -> None:
    orphan = put(stored, 0, "orphan", tmp_path)
    stored.put("manifest-000001.parquet", stored.read("manifest-000001.parquet")[:-9])
    now = 2e10
    with pytest.raises(
        CorruptShardError, match=r"manifest-000001(.|\n)*--repair', which removes it: .*nothing is dele"
    ):
        find_garbage(stored, now=now)
    repair_store(stored, verify_store(stored))
    assert [item.path for item in find_garbage(stored, now=now)] == [orphan.file]


def test_repair_of_a_store_with_a_newer_programs_commit_changes_nothing(files: StoreFiles) -> None:
    path = Path(files.url, build_commit_path(1))
    found = verify_store(files)
    edit_sealed(path, '"format_version":1', '"format_version":2,"new":0')
    newer = path.read_text()
    with pytest.raises(IncompatibleStoreError, match="format version differs"):
        verify_store(files)
    with pytest.raises(IncompatibleStoreError, match="format version differs"):
        repair_store(files, found)
    assert path.read_text() == newer
    assert list_manifests(files) == [1]


def test_what_killed_writes_left_is_garbage_after_the_grace_period(
    files: StoreFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # kill -9 runs no finally
    files.put("data/0000009-dead.parquet", b"half")
    files.create("commits/0000009.json", b"half")
    files.create("probe/x", b"1")
    monkeypatch.setattr(Path, "unlink", unlink)
    for path in ("commits/0000009.json", "data/0000009-dead.parquet"):
        Path(files.url, path).unlink()
    left = [path.relative_to(files.url).as_posix() for path in Path(files.url).rglob(".*.tmp")]
    assert sorted(path.partition("/")[0] for path in left) == ["commits", "probe"]  # a put moves its file away
    half = Path(files.url, "data", f".0000009-dead.parquet.{'0' * 32}.tmp")
    half.write_bytes(b"half")
    assert find_garbage(files) == []
    garbage = find_garbage(files, now=half.stat().st_mtime + 25 * 3600)
    expected = sorted([*left, half.relative_to(files.url).as_posix(), "probe/x"])
    assert [item.path for item in garbage] == expected
    delete_garbage(files, garbage)
    assert not list(Path(files.url).rglob(".*"))
    assert verify_store(files).is_clean


def test_verification_counts_quarantined_units_apart(store_url: str, tmp_path: Path) -> None:
    files = StoreFiles(store_url)
    plan = create_plan(files, build_plan(3))
    for unit in (0, 1):
        commit_unit(files, put(files, unit, "a", tmp_path))
    for unit in (1, 2):  # unit 1 was captured after it had been set aside
        quarantine_unit(files, QuarantinedUnit(unit=unit, attempts=3, error="NaN"))
    write_manifest(files, plan.compute_fingerprint())
    verification = verify_store(files)
    assert verification.is_clean
    assert (verification.units, verification.units_planned, verification.quarantined) == (2, 3, 1)
