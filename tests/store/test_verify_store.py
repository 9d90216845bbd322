"""Verification: whatever is damaged is named, with unit, file and part, and a repair has it captured again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_up import VOCAB_SIZE, build_plan, build_records, edit_sealed, put_shard

from logitstore.store.commit import COMMITS, build_commit_path, commit_unit, list_units, read_commit
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import write_manifest
from logitstore.store.plan import create_plan
from logitstore.store.repair import repair_store
from logitstore.store.sealed_json import seal, unseal
from logitstore.store.verify import verify_store


def capture_all(files: StoreFiles, folder: Path, attempt: str) -> None:
    plan = create_plan(files, build_plan(3))
    for unit in sorted({0, 1, 2} - set(list_units(files, COMMITS))):
        records = build_records(4, unit=unit, vocab_size=VOCAB_SIZE)
        commit_unit(files, put_shard(files, plan, unit, records, attempt, folder))
    write_manifest(files, plan.compute_fingerprint())


def test_damaged_row_group_is_the_only_one_complained_about(store_url: str, tmp_path: Path) -> None:
    files = StoreFiles(store_url)
    plan = create_plan(files, build_plan(1))
    records = build_records(30, vocab_size=VOCAB_SIZE)
    commit = put_shard(files, plan, 0, records, "a", tmp_path)
    assert commit.shard is not None
    assert len(commit.shard.row_groups) > 2
    commit_unit(files, commit)
    write_manifest(files, plan.compute_fingerprint())
    flip(files, str(commit.file), commit.shard.row_groups[1].offset + 20)
    [problem] = verify_store(files).problems
    assert problem.what.startswith("row group 1: ")


def flip(files: StoreFiles, path: str, place: int) -> None:
    data = bytearray(files.read(path))
    data[place] ^= 4
    files.put(path, bytes(data))


@pytest.mark.parametrize(
    ("place", "what"),
    [(2, "outside row groups and footer"), (500, "row group 0: the bytes"), (-30, "footer: the bytes")],
)
def test_verify_names_unit_file_and_part_of_a_flipped_bit(
    store_url: str, tmp_path: Path, place: int, what: str
) -> None:
    files = StoreFiles(store_url)
    capture_all(files, tmp_path, "a")
    flip(files, str(read_commit(files, 1).file), place)
    [problem] = verify_store(files).problems
    assert (problem.unit, problem.path) == (1, read_commit(files, 1).file)
    assert what in problem.what
    assert "--repair" in problem.what_to_do
    assert verify_store(files, quick=True).is_clean  # quick looks at sizes and metadata only


def test_repair_requeues_damaged_units_and_the_next_capture_restores_them(store_url: str, tmp_path: Path) -> None:
    files = StoreFiles(store_url)
    capture_all(files, tmp_path, "a")
    flip(files, str(read_commit(files, 1).file), 700)
    assert repair_store(files, verify_store(files)) == [1]
    assert {record.address.unit for record in LogitStore.open(files.url)} == {0, 2}
    capture_all(files, tmp_path, "b")
    assert verify_store(files).is_clean
    assert {record.address.unit for record in LogitStore.open(files.url)} == {0, 1, 2}


@pytest.mark.parametrize("damage", ["missing file", "truncated file", "damaged commit", "other unit's commit"])
def test_verify_finds_damage_of_files_and_commits(tmp_path: Path, damage: str) -> None:
    root = tmp_path / "store"
    files = StoreFiles(str(root))
    capture_all(files, tmp_path, "a")
    data, commit = root / str(read_commit(files, 1).file), root / build_commit_path(1)
    match damage:
        case "missing file":
            data.unlink()
        case "truncated file":
            data.write_bytes(data.read_bytes()[:-1])
        case "damaged commit":
            commit.write_bytes(commit.read_bytes()[:-5])
        case _:
            commit.write_bytes((root / build_commit_path(0)).read_bytes())
    problems = verify_store(files).problems
    assert problems
    assert {problem.unit for problem in problems} == {1}


@pytest.mark.parametrize("name", ["records", "taught_positions", "entropy_sum", "tail_mass_sum", "tail_histogram"])
def test_commit_whose_row_group_statistics_lie_is_found(tmp_path: Path, name: str) -> None:
    root = tmp_path / "store"
    files = StoreFiles(str(root))
    capture_all(files, tmp_path, "a")
    path = root / build_commit_path(2)
    values = json.loads(unseal(path.read_bytes()))
    row_group = values["shard"]["row_groups"][0]
    committed = row_group[name]
    row_group[name] = [*committed[:-1], committed[-1] + 1] if isinstance(committed, list) else committed + 1
    path.write_bytes(seal(json.dumps(values).encode()))
    problems = verify_store(files).problems
    assert {problem.unit for problem in problems} == {2}
    assert any(f"row group 0: {name}: the commit says" in problem.what for problem in problems)


def test_commit_whose_documents_do_not_add_up_is_found(tmp_path: Path) -> None:
    root = tmp_path / "store"
    files = StoreFiles(str(root))
    capture_all(files, tmp_path, "a")
    path = root / build_commit_path(2)
    edit_sealed(path, '"documents":4,"recorded_documents":4', '"documents":5,"recorded_documents":4')
    [problem] = verify_store(files).problems
    assert "5 documents, but 4 recorded and 0 dead letters" in problem.what
