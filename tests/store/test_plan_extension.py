"""A store that grows: extensions of its plan, created once each, and nothing changed that was there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up import build_plan, build_records, put_shard

from logitstore.corpus.documents import CorpusFile
from logitstore.corpus.units import UnitTable
from logitstore.errors import IncompatibleStoreError
from logitstore.store import verify
from logitstore.store.commit import Outcome, build_attempt, build_commit_path, commit_unit
from logitstore.store.extension import PlanExtension, build_extension_path, create_extension
from logitstore.store.files import StoreFiles
from logitstore.store.garbage import find_garbage
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import list_manifests, write_manifest
from logitstore.store.plan import PLAN_PATH, StorePlan, create_plan, read_plan
from logitstore.store.sealed_json import unseal
from logitstore.store.verify import verify_store
from logitstore.stream.iterator import RecordStream


def build_extension(plan: StorePlan, num_units: int, **changes: object) -> PlanExtension:
    """More made-up files, one unit each."""
    units = np.arange(num_units)
    table = UnitTable(span_unit=units, span_file=units, span_start=units * 0, span_stop=units * 0 + 100)
    files = tuple(
        CorpusFile(
            path=f"/more/{len(plan.files) + i}.txt",
            source="more",
            format="text",
            compression="none",
            bytes=100,
            fingerprint=f"{i:064d}",
        )
        for i in range(num_units)
    )
    values: dict[str, object] = {
        "plan_fingerprint": plan.compute_fingerprint(),
        "first_file": len(plan.files),
        "first_unit": len(plan.build_unit_table()),
        "files": files,
        "units": table.to_json(),
    }
    return PlanExtension.model_validate({**values, **changes})


def capture_units(files: StoreFiles, plan: StorePlan, units: range, folder: Path) -> None:
    for unit in units:
        commit = put_shard(files, plan, unit, build_records(6, unit=unit), build_attempt(), folder)
        assert commit_unit(files, commit) is Outcome.WON
    write_manifest(files, plan.compute_fingerprint())


def grow(files: StoreFiles, num_units: int) -> StorePlan:
    plan = read_plan(files)
    assert create_extension(files, len(plan.extensions) + 2, build_extension(plan, num_units))
    return read_plan(files)


def test_store_that_has_grown_reads_old_and_new_manifests(store_url: str, tmp_path: Path) -> None:
    files = StoreFiles(store_url)
    plan = create_plan(files, build_plan(2))
    capture_units(files, plan, range(2), tmp_path)
    before = LogitStore.open(store_url)
    grown = grow(files, 3)
    assert len(grown.build_unit_table()) == 5
    capture_units(files, grown, range(2, 5), tmp_path)
    after, pinned = LogitStore.open(store_url), LogitStore.open(store_url, manifest=1)
    assert (len(before), len(pinned), len(after)) == (12, 12, 30)
    assert pinned.fingerprint == before.fingerprint != after.fingerprint
    assert after.list_sources() == ["corpus", "more"]
    for i in range(12):
        np.testing.assert_array_equal(after[i].token_ids, before[i].token_ids)
    assert not verify_store(files).problems
    assert find_garbage(files, grace_seconds=0) == []


def test_training_stream_of_a_pinned_manifest_is_the_same_after_the_store_has_grown(tmp_path: Path) -> None:
    files = StoreFiles(str(tmp_path / "store"))
    capture_units(files, create_plan(files, build_plan(2)), range(2), tmp_path)

    def draw() -> list[list[str]]:
        stream = RecordStream(LogitStore.open(files.url, manifest=1), global_batch_sequences=4, seed=1)
        batches = iter(stream)
        return [[str(address) for address in next(batches).addresses()] for _ in range(6)]

    expected = draw()
    capture_units(files, grow(files, 2), range(2, 4), tmp_path)
    assert draw() == expected


def test_commits_of_new_units_carry_the_fingerprint_of_the_plan(tmp_path: Path) -> None:
    files = StoreFiles(str(tmp_path / "store"))
    before = create_plan(files, build_plan(2))
    grown = grow(files, 1)
    assert grown.compute_fingerprint() == before.compute_fingerprint()
    assert grown.extensions[0].first_unit == 2
    assert json.loads(unseal(files.read(PLAN_PATH))) == json.loads(before.model_dump_json())


def test_units_of_extensions_refer_to_their_own_files(tmp_path: Path) -> None:
    files = StoreFiles(str(tmp_path / "store"))
    create_plan(files, build_plan(2))
    grow(files, 1)
    plan = grow(files, 2)
    table = plan.build_unit_table()
    paths = [plan.files[span.file_index].path for unit in range(5) for span in table.spans(unit)]
    assert paths == ["/corpus/0.txt", "/corpus/1.txt", "/more/2.txt", "/more/3.txt", "/more/4.txt"]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"plan_fingerprint": "9" * 64}, "extension 2 of plan 9999"),
        ({"first_unit": 7}, "unit 7"),
        ({"first_file": 7}, "from file 7"),
        ({"format_version": 99}, "format version differs\n  in the store: 99"),
    ],
)
def test_extension_that_does_not_continue_the_plan_is_refused_with_both_sides(
    changes: dict[str, object], found: str, tmp_path: Path
) -> None:
    files = StoreFiles(str(tmp_path / "store"))
    plan = create_plan(files, build_plan(2))
    create_extension(files, 2, build_extension(plan, 1, **changes))
    with pytest.raises(IncompatibleStoreError, match=found):
        read_plan(files)


def test_plan_with_a_missing_or_damaged_extension_names_the_object(tmp_path: Path) -> None:
    files = StoreFiles(str(tmp_path / "store"))
    create_plan(files, build_plan(2))
    grow(files, 1)
    grow(files, 1)
    files.delete(build_extension_path(2))
    with pytest.raises(IncompatibleStoreError, match=r"plan-000003\.json: does not continue the plan"):
        read_plan(files)
    files.put(build_extension_path(2), b"{}")
    with pytest.raises(IncompatibleStoreError, match=r"plan-000002\.json: expected an extension of a plan"):
        read_plan(files)


def test_verify_beside_a_capture_that_extends_the_store_blames_no_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = StoreFiles(str(tmp_path / "store"))
    capture_units(files, create_plan(files, build_plan(2)), range(2), tmp_path)
    listed = verify.list_unit_files

    def extend_first(*arguments: Any) -> Any:
        if not read_plan(files).extensions:
            plan = grow(files, 1)
            commit_unit(files, put_shard(files, plan, 2, build_records(2, unit=2), "a", tmp_path))
        return listed(*arguments)

    monkeypatch.setattr(verify, "list_unit_files", extend_first)
    assert [problem.unit for problem in verify_store(files).problems] in ([], [None])  # the manifest may be behind


class KilledError(BaseException):
    """Stands for SIGKILL: nobody catches it."""


class DyingFiles(StoreFiles):
    """A store whose process dies before one of its writes."""

    writes_left = 0

    def _count(self) -> None:
        if not self.writes_left:
            raise KilledError
        self.writes_left -= 1

    def create(self, path: str, data: bytes) -> bool:
        self._count()
        return super().create(path, data)

    def put_file(self, path: str, source: Path) -> None:
        self._count()
        super().put_file(path, source)

    def delete(self, path: str) -> None:
        self._count()
        super().delete(path)


def test_kill_before_any_write_of_a_growing_store_leaves_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    """Capture two units, extend by two, capture those: every prefix of the writes, then a rerun to the end."""

    def run(files: StoreFiles) -> None:
        plan = create_plan(files, build_plan(2))
        if not read_plan(files).extensions:
            capture_missing(files, plan)
            create_extension(files, 2, build_extension(plan, 2, created_at="once"))
        capture_missing(files, read_plan(files))

    def capture_missing(files: StoreFiles, plan: StorePlan) -> None:
        for unit in range(len(plan.build_unit_table())):
            if not files.exists(build_commit_path(unit)):
                commit_unit(files, put_shard(files, plan, unit, build_records(3, unit=unit), build_attempt(), tmp_path))
        write_manifest(files, plan.compute_fingerprint())

    for writes in range(40):
        dying = DyingFiles(str(tmp_path / f"store-{writes}"))
        dying.writes_left = writes
        try:
            run(dying)
        except KilledError:
            is_done = False
        else:
            is_done = True
        files = StoreFiles(dying.url)
        seen = len(LogitStore.open(files.url)) if list_manifests(files) else 0
        assert seen in (0, 6, 12)
        run(files)
        assert len(LogitStore.open(files.url)) == 12
        assert verify_store(files).problems == ()
        if is_done:
            assert writes > 10
            return
    pytest.fail("the capture never finished")
