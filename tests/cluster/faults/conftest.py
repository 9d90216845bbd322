"""A cluster of several machines that captures are run on, and faults are planned for."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.faults.fault_cluster import FaultCluster


@pytest.fixture(scope="module")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultCluster]:
    temporary = Path(tempfile.mkdtemp(prefix="lf-", dir="/tmp"))  # sockets have short names
    cluster = FaultCluster(tmp_path_factory.mktemp("cluster"), temporary)
    try:
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture
def cluster(running_cluster: FaultCluster) -> FaultCluster:
    """Two machines with room for an actor each, and no faults yet."""
    running_cluster.prepare(num_machines=2)
    return running_cluster
