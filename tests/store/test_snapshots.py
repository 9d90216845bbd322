"""Manifests: which commits a snapshot reads, what it takes over, and what its rows hold."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_up import VOCAB_SIZE, build_plan, build_records, edit_sealed, put_shard

import logitstore
from logitstore.corpus.documents import CorpusFile
from logitstore.errors import CorruptShardError, IncompatibleStoreError
from logitstore.shard.summary import RowGroup, ShardSummary
from logitstore.store.commit import Commit, QuarantinedUnit, build_commit_path, commit_unit, read_commit
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import build_manifest_path, read_manifest, take_snapshot, write_manifest
from logitstore.store.manifest_table import SCHEMA
from logitstore.store.plan import CorpusPlan, StorePlan, create_plan, read_plan
from logitstore.store.running import RunningCapture

YEAR_SECONDS = 365 * 24 * 3600.0


class CountingFiles(StoreFiles):
    """Notes what is read."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reads: list[str] = []

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        self.reads.append(path)
        return super().read(path, start, stop)


class VanishingFiles(StoreFiles):
    """Lists what somebody deletes before it is read."""

    def __init__(self, url: str, vanishing: str) -> None:
        super().__init__(url)
        self._vanishing = vanishing

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        if path == self._vanishing:
            raise FileNotFoundError(path)
        return super().read(path, start, stop)


def commit(files: StoreFiles, unit: int, attempt: str, folder: Path, num_records: int = 4) -> None:
    records = build_records(num_records, unit=unit, vocab_size=VOCAB_SIZE)
    commit_unit(files, put_shard(files, read_plan(files), unit, records, attempt, folder))


@pytest.fixture
def files(tmp_path: Path) -> CountingFiles:
    """A finished store of three units, committed a year before their manifest."""
    files = CountingFiles(str(tmp_path / "store"))
    plan = create_plan(files, build_plan(3))
    for unit in range(3):
        commit(files, unit, "first", tmp_path)
        age(files, unit)
    write_manifest(files, plan.compute_fingerprint())
    return files


def age(files: StoreFiles, unit: int) -> None:
    path = Path(files.url, build_commit_path(unit))
    os.utime(path, (path.stat().st_mtime - YEAR_SECONDS,) * 2)


def capture_again(files: StoreFiles, unit: int, folder: Path) -> None:
    files.delete(build_commit_path(unit))
    commit(files, unit, "second", folder)


def list_attempts(files: StoreFiles) -> list[str]:
    return read_manifest(files).read_units("attempt")["attempt"].to_pylist()  # type: ignore[no-any-return]  # pyarrow is untyped


def test_snapshot_takes_units_of_the_previous_manifest_over_unread(files: CountingFiles, tmp_path: Path) -> None:
    files.reads.clear()
    previous = read_manifest(files)
    snapshot = take_snapshot(files, previous.plan_fingerprint, previous)
    assert files.reads == [build_manifest_path(1)]
    assert snapshot.file.read().equals(previous.file.read())


def test_unit_captured_again_after_its_commit_was_deleted_replaces_its_rows(
    files: CountingFiles, tmp_path: Path
) -> None:
    capture_again(files, 1, tmp_path)
    files.reads.clear()
    assert write_manifest(files, read_plan(files).compute_fingerprint()).number == 2
    assert list_attempts(files) == ["first", "second", "first"]
    assert [path for path in files.reads if path.startswith("commits/")] == [build_commit_path(1)]


def test_unit_named_for_a_recheck_is_read_whatever_its_commit_times_say(files: CountingFiles, tmp_path: Path) -> None:
    capture_again(files, 1, tmp_path)
    age(files, 1)
    fingerprint = read_plan(files).compute_fingerprint()
    assert write_manifest(files, fingerprint).number == 1  # nothing tells the two commits apart
    assert write_manifest(files, fingerprint, [1]).number == 2
    assert list_attempts(files) == ["first", "second", "first"]


def test_rebuilt_manifest_takes_nothing_over(files: CountingFiles, tmp_path: Path) -> None:
    capture_again(files, 1, tmp_path)
    age(files, 1)
    write_manifest(files, read_plan(files).compute_fingerprint(), rebuild=True, without=[2])
    assert list_attempts(files) == ["first", "second"]


def test_commit_deleted_between_listing_and_reading_is_left_out(files: StoreFiles) -> None:
    vanishing = VanishingFiles(files.url, build_commit_path(1))
    assert take_snapshot(vanishing, read_plan(files).compute_fingerprint(), None).units.tolist() == [0, 2]


def test_manifest_rows_hold_what_the_commits_say_and_sums_are_right(tmp_path: Path) -> None:
    files = StoreFiles(str(tmp_path / "store"))
    plan = create_plan(files, build_plan(2))
    for unit in (1, 0):
        commit(files, unit, "a", tmp_path, num_records=30)
    table = write_manifest(files, plan.compute_fingerprint()).file.read()
    shards = [shard for unit in range(2) if (shard := read_commit(files, unit).shard) is not None]
    assert table["unit"].to_pylist() == [unit for unit, shard in enumerate(shards) for _ in shard.row_groups]
    groups = [group for shard in shards for group in shard.row_groups]
    assert len(groups) > 4
    assert [digest.hex() for digest in table["sha256"].to_pylist()] == [group.sha256 for group in groups]
    for name in ("offset", "bytes", "records", "positions", "entropy_sum", "impossible_tokens", "tail_mass_sum"):
        assert table[name].to_pylist() == [getattr(group, name) for group in groups]
    is_first = [row_group == 0 for row_group in table["row_group"].to_pylist()]
    for name in ("file", "attempt", "file_bytes", "footer_sha256", "entropy_histogram", "column_bytes", "documents"):
        assert [value is not None for value in table[name].to_pylist()] == is_first
    assert sum(filter(None, table["file_bytes"].to_pylist())) == sum(shard.bytes for shard in shards)
    statistics = LogitStore.open(files.url).compute_statistics()
    histogram = np.sum([group.entropy_histogram for group in groups], axis=0)
    assert statistics.entropy_histogram == tuple(histogram.tolist())
    assert statistics.column_bytes["entropy"] == sum(group.column_bytes["entropy"] for group in groups)


def test_manifest_built_in_pieces_equals_one_built_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = StoreFiles(str(tmp_path / "store"))
    fingerprint = create_plan(files, build_plan(4)).compute_fingerprint()
    for unit in range(4):
        commit(files, unit, "a", tmp_path, num_records=20)
    whole = take_snapshot(files, fingerprint, None)
    monkeypatch.setattr("logitstore.store.manifest_table._COMMITS_AT_A_TIME", 2)
    assert take_snapshot(files, fingerprint, None).file.data == whole.file.data


def test_manifest_of_many_row_groups_costs_few_bytes_of_each(tmp_path: Path) -> None:
    """What a store of millions of row groups rests on: 90 bytes of memory for each, and none of it Python objects."""
    files = StoreFiles(str(tmp_path / "store"))
    plan = create_plan(files, build_plan(1, shard={"codec": {"kind": "float32"}, "row_group_bytes": 1}))
    records = build_records(400, vocab_size=VOCAB_SIZE, length=2)
    commit_unit(files, put_shard(files, plan, 0, records, "a", tmp_path))
    manifest = write_manifest(files, plan.compute_fingerprint())
    assert len(manifest.digests) == 400
    assert len(manifest.file.data) / 400 < 90


def test_manifest_with_other_columns_is_damaged(files: StoreFiles) -> None:
    path = Path(files.url, build_manifest_path(1))
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["sha256"]), path)
    with pytest.raises(CorruptShardError, match="expected a manifest"):
        read_manifest(files)


def test_commit_of_a_newer_format_is_refused_and_never_taken_for_damage(files: StoreFiles) -> None:
    path = Path(files.url, build_commit_path(1))
    edit_sealed(path, '"format_version":1', '"format_version":2,"new":0')
    with pytest.raises(IncompatibleStoreError, match="in the commit: 2\n  this program reads: 1"):
        read_commit(files, 1)


def test_format_page_names_every_column_of_a_manifest_and_every_field_of_its_sources() -> None:
    page = Path(logitstore.__file__).with_name("FORMAT.md").read_text(encoding="utf-8")
    sections = {section.partition("\n")[0]: section for section in page.split("\n## ")}
    for title, names in {
        "manifest-<n>.parquet": SCHEMA.names,
        "commits/<unit>.json": [*Commit.model_fields, *ShardSummary.model_fields, *RowGroup.model_fields],
        "quarantine/<unit>.json": QuarantinedUnit.model_fields,
        "running/<run>.json": RunningCapture.model_fields,
        "plan.json": [*StorePlan.model_fields, *CorpusPlan.model_fields, *CorpusFile.model_fields],
    }.items():
        assert [name for name in names if f"`{name}`" not in sections[title]] == []
