"""The benchmark of scale, on a store small enough for a test."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import list_manifests
from logitstore.store.plan import read_plan
from logitstore.store.verify import verify_store
from tools.benchmark import app
from tools.benchmark.scale_steps import STEPS
from tools.benchmark.simulated_store import write_units


@pytest.mark.slow
def test_scale_of_few_units_prints_a_row_for_every_step_with_numbers_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    result = CliRunner().invoke(
        app, ["scale", "--units", "24", "--row-groups", "3", "--folder", str(folder)], catch_exceptions=False
    )
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("`logitstore benchmark scale --units 24 --row-groups 3`, logitstore ")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0] == ["step", "seconds", "of a processor", "peak MiB", "outcome"]
    outcomes = {title: outcome for title, *_, outcome in rows[2:]}
    for _, seconds, processor_seconds, peak, _ in rows[2:]:
        assert 0 <= float(seconds.partition(" ±")[0]) < 60
        assert 0 <= float(processor_seconds) < 60
        assert 10 < int(peak.replace(",", "")) < 2000
    assert outcomes["list what is left to do, local files"] == "23 committed, 1 left"
    assert outcomes["list commits, entries as of s3fs"].startswith("24 committed")
    assert outcomes["write a manifest from nothing"].startswith("manifest 1: 23 units")
    assert outcomes["write a manifest, 1 new commits"].startswith("manifest 2: 24 units")
    assert outcomes["write a manifest, nothing new"].startswith("manifest 2: 24 units")
    assert outcomes["open the store"] == "288 records in 72 row groups"
    assert outcomes["gc: find garbage"] == "0 files of 24"
    assert outcomes["verify --quick"] == "24 units, 0 problems"
    assert len(outcomes) == 12
    assert LogitStore.open(str(folder)).num_row_groups == 72


def test_simulated_units_pass_every_check_that_reads_no_shard(tmp_path: Path) -> None:
    url = str(tmp_path)
    STEPS["plan"](url, 5)()
    write_units(tmp_path, range(5), 2, read_plan(StoreFiles(url)).compute_fingerprint(), are_old=True)
    assert STEPS["write_the_manifest"](url, 5)().startswith("manifest 1: 5 units")
    found = verify_store(StoreFiles(url), quick=True)
    assert (found.units, found.units_planned, found.problems) == (5, 5, ())
    assert list_manifests(StoreFiles(url)) == [1]
