"""The store's protocol: create-only commits, races, kills between any two operations, manifests, repair, garbage."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from made_up import VOCAB_SIZE, build_plan, build_records, put_shard

from logitstore.errors import ConfigError, CorruptShardError, IncompatibleStoreError, OutsideError, StoreNotFoundError
from logitstore.store.commit import (
    COMMITS,
    Commit,
    Outcome,
    QuarantinedUnit,
    commit_unit,
    list_units,
    quarantine_unit,
    read_commit,
    read_quarantine,
)
from logitstore.store.files import StoreFiles
from logitstore.store.garbage import delete_garbage, find_garbage
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import list_manifests, read_manifest, write_manifest
from logitstore.store.plan import create_plan, read_plan
from logitstore.store.repair import repair_store
from logitstore.store.verify import verify_store
from logitstore.teacher.protocol import TopKMethod

BuildStore = Callable[..., LogitStore]


class KilledError(BaseException):
    """Stands for SIGKILL: no handler of the code under test may catch it."""


class FaultyFiles(StoreFiles):
    """A store whose writing process dies before its n-th write, or whose creates misbehave as object stores do."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.writes_left: int | None = None
        self.create_faults: list[str] = []

    def _count(self) -> None:
        if self.writes_left is not None:
            if self.writes_left == 0:
                raise KilledError
            self.writes_left -= 1

    def create(self, path: str, data: bytes) -> bool:
        self._count()
        fault = self.create_faults.pop(0) if self.create_faults else None
        if fault == "stored, answer lost, client tried again":
            super().create(path, data)
            return False
        if fault == "stored, answer lost":
            super().create(path, data)
            raise OutsideError("connection reset")
        if fault == "409, nothing stored":
            return False
        if fault == "unreachable":
            raise OutsideError("timeout")
        return super().create(path, data)

    def put_file(self, path: str, source: Path) -> None:
        self._count()
        super().put_file(path, source)

    def delete(self, path: str) -> None:
        self._count()
        super().delete(path)


@pytest.fixture
def files(store_url: str) -> FaultyFiles:
    return FaultyFiles(store_url)


def put(files: StoreFiles, unit: int, attempt: str, folder: Path, seed: int = 0) -> Commit:
    records = build_records(4, unit=unit, vocab_size=VOCAB_SIZE, seed=seed)
    return put_shard(files, read_plan(files), unit, records, attempt, folder)


def capture_all(files: StoreFiles, folder: Path, attempt: str, num_units: int = 3) -> None:
    """What a capture does, in its order of operations."""
    plan = create_plan(files, build_plan(num_units))
    for unit in range(num_units):
        if unit not in list_units(files, COMMITS):
            commit = put(files, unit, attempt, folder)
            if commit_unit(files, commit) is Outcome.LOST and commit.file:
                files.delete(commit.file)
    write_manifest(files, plan.compute_fingerprint())


def test_create_only_has_one_winner_of_sixteen(store_url: str) -> None:
    files = StoreFiles(store_url)
    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(lambda i: files.create("commits/x.json", bytes([i]) * 1000), range(16)))
    assert outcomes.count(True) == 1
    assert files.read("commits/x.json") == bytes([outcomes.index(True)]) * 1000


@pytest.mark.parametrize(
    "store_url",
    ["file", "memory", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("s3", "gcs", "azure"))],
    indirect=True,
)
def test_kill_before_any_write_leaves_a_store_that_a_rerun_completes(files: FaultyFiles, tmp_path: Path) -> None:
    """Every prefix of a capture's writes, then a rerun: each unit committed once, nothing missing, verify clean."""
    for writes in range(40):
        url = f"{files.url}-{writes}"
        killed = FaultyFiles(url)
        killed.writes_left = writes
        try:
            capture_all(killed, tmp_path, "first")
        except KilledError:
            with_finish = False
        else:
            with_finish = True
        capture_all(StoreFiles(url), tmp_path, "second")
        store = LogitStore.open(url)
        assert sorted(record.address for record in store) == sorted(
            record.address for unit in range(3) for record in build_records(4, unit=unit, vocab_size=VOCAB_SIZE)
        )
        assert verify_store(StoreFiles(url)).problems == ()
        if with_finish:
            assert writes > 8
            return
    pytest.fail("the capture never finished")


@pytest.mark.parametrize(
    "fault", ["stored, answer lost, client tried again", "stored, answer lost", "409, nothing stored", "unreachable"]
)
def test_commit_with_an_ambiguous_answer_is_won_once(files: FaultyFiles, tmp_path: Path, fault: str) -> None:
    create_plan(files, build_plan(1))
    commit = put(files, 0, "mine", tmp_path)
    files.create_faults = [fault]
    assert commit_unit(files, commit) is Outcome.WON
    assert read_commit(files, 0).attempt == "mine"


def test_second_commit_of_a_unit_is_lost_and_changes_nothing(files: FaultyFiles, tmp_path: Path) -> None:
    create_plan(files, build_plan(1))
    first, second = put(files, 0, "first", tmp_path), put(files, 0, "second", tmp_path, seed=1)
    assert commit_unit(files, first) is Outcome.WON
    for fault in ([], ["unreachable"], ["409, nothing stored"]):
        files.create_faults = list(fault)
        assert commit_unit(files, second) is Outcome.LOST
    assert commit_unit(files, first) is Outcome.WON
    assert read_commit(files, 0).attempt == "first"


def test_commit_on_storage_that_stays_away_raises_and_commits_nothing(files: FaultyFiles, tmp_path: Path) -> None:
    create_plan(files, build_plan(1))
    commit = put(files, 0, "mine", tmp_path)
    files.create_faults = ["unreachable"] * 99
    with pytest.raises(OutsideError, match="timeout"):
        commit_unit(files, commit)
    assert list_units(files, COMMITS) == []


def test_storage_that_ignores_create_only_is_refused_unless_there_is_one_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = StoreFiles(str(tmp_path / "store"))

    def overwrite(self: StoreFiles, path: str, data: bytes) -> bool:
        self.put(path, data)
        return True

    monkeypatch.setattr(StoreFiles, "create", overwrite)
    with pytest.raises(IncompatibleStoreError, match="expected a second create-only put on one name to fail"):
        create_plan(files, build_plan(1))
    assert create_plan(files, build_plan(1, single_writer=True)).single_writer


def test_plan_with_other_settings_is_refused_with_both_sides(files: FaultyFiles) -> None:
    create_plan(files, build_plan(3))
    with pytest.raises(IncompatibleStoreError, match=r"method.k\n    in the store:     8\n    in this capture:  16"):
        create_plan(files, build_plan(3, method=TopKMethod(k=16)))


def test_plan_made_again_is_joined_whatever_date_and_engine_release(files: FaultyFiles) -> None:
    first = create_plan(files, build_plan(3, created_at="2026-01-01"))
    assert create_plan(files, build_plan(3, created_at="2027-01-01")).created_at == first.created_at


def test_manifest_is_written_once_for_the_same_commits(files: FaultyFiles, tmp_path: Path) -> None:
    capture_all(files, tmp_path, "first")
    fingerprint = read_plan(files).compute_fingerprint()
    assert write_manifest(files, fingerprint).number == 1
    assert list_manifests(files) == [1]


def test_pinned_manifest_keeps_its_records_when_the_store_grows(files: FaultyFiles, tmp_path: Path) -> None:
    plan = create_plan(files, build_plan(3))
    for unit in (0, 1):
        commit_unit(files, put(files, unit, "a", tmp_path))
        write_manifest(files, plan.compute_fingerprint())
    pinned, latest = LogitStore.open(files.url, manifest=1), LogitStore.open(files.url)
    assert ([r.address.unit for r in pinned], [r.address.unit for r in latest]) == ([0] * 4, [0] * 4 + [1] * 4)
    assert pinned.fingerprint != latest.fingerprint


def test_live_store_reads_what_is_committed_before_any_manifest(files: FaultyFiles, tmp_path: Path) -> None:
    create_plan(files, build_plan(3))
    commit_unit(files, put(files, 1, "a", tmp_path))
    with pytest.raises(StoreNotFoundError, match="the capture has not finished"):
        LogitStore.open(files.url)
    assert [record.address.unit for record in LogitStore.open(files.url, manifest="live")] == [1] * 4


def test_damaged_manifest_is_an_error_and_rebuilt_by_repair(tmp_path: Path) -> None:
    files = StoreFiles(str(tmp_path / "store"))
    capture_all(files, tmp_path, "a")
    manifest = tmp_path / "store" / "manifest-000001.parquet"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    with pytest.raises(CorruptShardError, match=r"manifest-000001.parquet: expected a manifest.*--repair"):
        LogitStore.open(files.url)
    verification = verify_store(files)
    assert [problem.path for problem in verification.problems] == ["manifest-000001.parquet"]
    assert repair_store(files, verification) == []
    assert verify_store(files).is_clean
    assert read_manifest(files).number == 2


def test_verify_of_a_capture_that_still_runs_finds_nothing_wrong(files: FaultyFiles, tmp_path: Path) -> None:
    plan = create_plan(files, build_plan(3))
    for unit in (0, 1):
        commit_unit(files, put(files, unit, "a", tmp_path))
        assert verify_store(files).problems == ()
        if unit == 0:
            write_manifest(files, plan.compute_fingerprint())
    commit_unit(files, put(files, 2, "a", tmp_path))
    [problem] = verify_store(files).problems  # finished, and readers would not see units 1 and 2
    assert "units committed but not listed: [1, 2]" in problem.what


def test_garbage_is_unreferenced_and_old_only(tmp_path: Path) -> None:
    root = tmp_path / "store"
    files = StoreFiles(str(root))
    capture_all(files, tmp_path, "a")
    old, new = put(files, 0, "orphan", tmp_path), put(files, 1, "inflight", tmp_path)
    for path in root.glob("data/*"):
        os.utime(path, (1, 1))
    os.utime(root / str(new.file))
    garbage = find_garbage(files, grace_seconds=3600)
    assert [item.path for item in garbage] == [old.file]
    delete_garbage(files, garbage)
    assert verify_store(files).is_clean
    assert files.exists(str(new.file))


def test_quarantine_keeps_the_first_error(files: FaultyFiles) -> None:
    for error in ("first", "second"):
        quarantine_unit(files, QuarantinedUnit(unit=3, attempts=3, error=error))
    assert [(entry.unit, entry.error) for entry in read_quarantine(files)] == [(3, "first")]


def test_local_write_that_dies_leaves_nothing_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = StoreFiles(str(tmp_path))

    def die(*_: Any) -> None:
        raise KilledError

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KilledError):
        files.create("commits/0000001.json", b"half")
    assert files.list(COMMITS) == []


def test_storage_that_denies_access_is_told_apart_from_storage_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = StoreFiles(str(tmp_path))
    errors: list[OSError] = [PermissionError("403 Forbidden"), OSError(5, "Input/output error")]

    def fail(*_: Any, **__: Any) -> bytes:
        raise errors.pop(0)

    monkeypatch.setattr(files._fs, "cat_file", fail)
    with pytest.raises(ConfigError, match=r"access denied.*check the credentials") as denied:
        files.read("plan.json")
    with pytest.raises(OutsideError, match="run the command again"):
        files.read("plan.json")
    assert denied.value.exit_code == 2
