"""Captures under faults drawn from a seed: a short while with every run of the tests, and as long as one likes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_proxy import FaultProxy

from tests.cluster.faults.fault_cluster import FaultCluster
from tests.cluster.faults.soak import Soak


@pytest.fixture
def soaked_cluster(tmp_path: Path) -> Iterator[FaultCluster]:
    """Three machines, in a cluster that nothing else has been run on."""
    temporary = Path(tempfile.mkdtemp(prefix="lf-", dir="/tmp"))
    (tmp_path / "cluster").mkdir()
    cluster = FaultCluster(tmp_path / "cluster", temporary)
    try:
        cluster.prepare(num_machines=3)
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_capture_under_random_faults_is_whole_in_the_end(
    soaked_cluster: FaultCluster, running_proxy: FaultProxy, tmp_path: Path
) -> None:
    soak = Soak(soaked_cluster, running_proxy, tmp_path, seed=7, num_units=30, pause=(1.0, 3.0), outages=(5,))
    report = soak.run(min_faults=5)
    assert len(report.log) >= 5
    assert report.units >= 30 * report.captures >= 30


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_captures_under_random_faults_for_many_minutes_are_all_whole_in_the_end(
    soaked_cluster: FaultCluster, running_proxy: FaultProxy, tmp_path: Path
) -> None:
    """LOGITSTORE_SOAK_MINUTES (20), LOGITSTORE_SOAK_SEED (0), LOGITSTORE_SOAK_OUTPUT: a folder for the report."""
    minutes = float(os.environ.get("LOGITSTORE_SOAK_MINUTES", "20"))
    seed = int(os.environ.get("LOGITSTORE_SOAK_SEED", "0"))
    output = Path(os.environ.get("LOGITSTORE_SOAK_OUTPUT", str(tmp_path)))
    soak = Soak(soaked_cluster, running_proxy, tmp_path, seed=seed, logs=output)
    try:
        soak.run(minutes, min_units=200 if minutes >= 20 else 0)
    finally:
        soak.report.write(output)
        print(soak.report.format_table())
