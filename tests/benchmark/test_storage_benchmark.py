"""The storage benchmark: every access is timed on a real storage, and nothing is left there."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from logitstore.store.files import StoreFiles
from tools.benchmark.storage import _build_ranges, storage

ACCESSES = ["put 9 MiB", "get 9 MiB", "range of 1 MiB", "range of 8 MiB", "range of 64 KiB", "16 small reads at once"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "s3"])
def test_storage_benchmark_prints_every_access_and_leaves_nothing(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    url: str = request.getfixturevalue("s3_url") if kind == "s3" else str(tmp_path / "scratch")
    storage(url, megabytes=9, repeats=1)
    lines = capsys.readouterr().out.strip().splitlines()
    clients = ["fsspec", "obstore"] if find_spec("obstore") else ["fsspec"]
    assert lines[0].startswith("`logitstore benchmark storage --megabytes 9 --repeats 1`")
    assert lines[2] == f"| access | {' | '.join(clients)} |"
    rows = [line.strip("| ").split(" | ") for line in lines[4:]]
    assert [row[0] for row in rows] == ACCESSES
    for row in rows:
        assert len(row) == 1 + len(clients)
        assert all(cell.split()[1] in ("MB/s", "ms", "reads/s") for cell in row[1:])
    files = StoreFiles(url)
    found = files._fs.find(files._root, detail=True) if files._fs.exists(files._root) else {}
    assert [name for name, entry in found.items() if entry["size"]] == []  # some servers keep an empty folder


def test_ranges_of_the_benchmark_differ_and_stay_within_the_shard() -> None:
    ranges = _build_ranges(9 << 20, 8 << 20)
    assert len(set(ranges)) == len(ranges) == 8
    assert all(start >= 0 and stop <= 9 << 20 and stop - start == 8 << 20 for start, stop in ranges)
