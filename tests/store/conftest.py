"""Where the tests of the store keep their stores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem


@pytest.fixture(params=["file", "memory", "s3"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a store that does not exist yet, on every kind of storage that runs on one machine."""
    if request.param == "s3":
        yield request.getfixturevalue("s3_url")
    elif request.param == "memory":
        yield f"memory://{tmp_path.name}"
        MemoryFileSystem.store.clear()
    else:
        yield str(tmp_path / "store")
