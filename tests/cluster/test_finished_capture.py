"""Reports of captures with nothing left to do: made from the store alone, without Ray."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from made_up import VOCAB_SIZE, build_identity, build_records, put_shard

from cluster.report import report_finished_capture
from cluster.settings import ClusterCaptureSettings, make_paths_absolute
from logitstore.errors import IncompatibleStoreError
from logitstore.planning import build_plan
from logitstore.settings import build_settings
from logitstore.store.commit import QuarantinedUnit, build_attempt, commit_unit, quarantine_unit
from logitstore.store.files import StoreFiles
from logitstore.store.manifest import read_manifest
from logitstore.store.plan import create_plan


def build_capture(folder: Path, **changes: Any) -> ClusterCaptureSettings:
    (folder / "corpus.jsonl").write_text('{"text": "some words"}\n' * 60)
    values = {
        "store": str(folder / "store"),
        "corpus": {"files": [str(folder / "corpus.jsonl")]},
        "teacher": {"model": "a teacher that nobody loads"},
        "sequences": {"length": 8},
        "unit_bytes": 400,
    }
    return build_settings(ClusterCaptureSettings, {**values, **changes}, where="test")


def fill_store(folder: Path, *, leave_out: int = 0, set_aside: int = 0) -> int:
    """Commit units of made-up records; returns how many units are planned."""
    settings = build_capture(folder)
    files = StoreFiles(settings.store)
    plan = create_plan(files, build_plan(settings, build_identity()))
    num_units = len(plan.build_unit_table())
    assert num_units >= 3
    for unit in range(num_units - leave_out - set_aside):
        records = build_records(2, unit=unit, vocab_size=VOCAB_SIZE)
        commit_unit(files, put_shard(files, plan, unit, records, build_attempt(), folder))
    for unit in range(num_units - leave_out - set_aside, num_units - leave_out):
        quarantine_unit(files, QuarantinedUnit(unit=unit, attempts=3, error="made up"))
    return num_units


def test_finished_capture_is_reported_with_a_manifest_of_all_units(tmp_path: Path) -> None:
    num_units = fill_store(tmp_path)
    report = report_finished_capture(build_capture(tmp_path), retry_quarantined=True)
    assert report is not None
    assert (report.figures.units_planned, report.figures.units_before) == (num_units, num_units)
    assert (report.figures.units_captured, report.quarantined_units) == (0, ())
    assert report.manifest_number is not None
    manifest = read_manifest(StoreFiles(str(tmp_path / "store")), report.manifest_number)
    assert manifest.units.tolist() == list(range(num_units))


def test_finished_capture_with_a_unit_set_aside_names_it_and_is_not_finished_for_a_retry(tmp_path: Path) -> None:
    num_units = fill_store(tmp_path, set_aside=1)
    report = report_finished_capture(build_capture(tmp_path))
    assert report is not None
    assert report.quarantined_units == (num_units - 1,)
    assert report_finished_capture(build_capture(tmp_path), retry_quarantined=True) is None


def test_capture_with_units_to_do_or_without_a_store_is_not_finished(tmp_path: Path) -> None:
    assert report_finished_capture(build_capture(tmp_path)) is None
    fill_store(tmp_path, leave_out=1)
    assert report_finished_capture(build_capture(tmp_path)) is None


def test_finished_capture_with_other_settings_is_refused_with_both_sides(tmp_path: Path) -> None:
    fill_store(tmp_path)
    with pytest.raises(IncompatibleStoreError, match=r"method.k\n    in the store: +64\n    in this capture: +4"):
        report_finished_capture(build_capture(tmp_path, method={"k": 4}))


@pytest.mark.parametrize("store", ["runs/store", "file://runs/store", "./runs/store"])
def test_relative_store_and_teacher_folder_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    found = make_paths_absolute(build_capture(tmp_path, store=store, teacher={"model": "model"}))
    assert (found.store, found.teacher.model) == (str(tmp_path / "runs/store"), str(tmp_path / "model"))
    assert found.teacher.tokenizer is None


@pytest.mark.parametrize("store", ["s3://bucket/store", "memory://store", os.sep + "absolute"])
def test_address_that_is_the_same_everywhere_stays(tmp_path: Path, store: str) -> None:
    found = make_paths_absolute(build_capture(tmp_path, store=store))
    assert (found.store, found.teacher.model) == (store, "a teacher that nobody loads")
