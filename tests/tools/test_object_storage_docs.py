"""docs/object-storage.md: its commands and its Python on an S3 server, and how often it says the storage is asked."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT
from made_up import build_plan, build_records, put_shard

from logitstore.store.commit import build_attempt, commit_unit
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import write_manifest
from logitstore.store.plan import create_plan
from logitstore.stream.iterator import RecordStream

PAGE = (ROOT / "docs/object-storage.md").read_text(encoding="utf-8")
URL = "s3://bucket/stores/docs"
[CONSOLE] = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line.removeprefix("$ logitstore ") for line in CONSOLE.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_run_on_an_s3_server(
    command: str, build_store: Callable[..., LogitStore], s3_url: str, logitstore: Any
) -> None:
    build_store(s3_url)
    stdout, _ = logitstore(*shlex.split(command.replace(URL, s3_url)))
    assert stdout.strip()


def test_python_of_the_page_opens_a_store(
    build_store: Callable[..., LogitStore], s3_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = build_store(s3_url)
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code.replace(URL, s3_url), {"endpoint": os.environ["AWS_ENDPOINT_URL"]})
    assert capsys.readouterr().out == f"{len(store)} records\n"


def test_storage_is_asked_as_often_as_the_page_says(s3_url: str, requests: list[str], tmp_path: Path) -> None:
    files, num_units = StoreFiles(s3_url), 12

    def count() -> dict[str, int]:
        found = dict(Counter(requests))
        requests.clear()
        return found

    plan = create_plan(files, build_plan(num_units))
    assert sum(count().values()) == 6
    assert "| a new store | 6," in PAGE
    for unit in range(num_units):
        commit_unit(files, put_shard(files, plan, unit, build_records(8, unit=unit), build_attempt(), tmp_path))
        assert count() == {"PUT": 2}
        assert "| a unit | 2 puts" in PAGE
    write_manifest(files, plan.compute_fingerprint())
    found = count()
    assert found["PUT"] == 1
    assert num_units < found["GET"] <= num_units + 3
    store = LogitStore.open(s3_url)
    assert sum(count().values()) == 4
    assert "| opening a store | 4 |" in PAGE
    stream = RecordStream(store, global_batch_sequences=8)
    for _ in range(3 * stream.steps_per_epoch):
        next(stream)
    stream.close()
    row_groups = len(store.manifest.read_row_groups("unit")["unit"])
    assert count()["GET"] <= 4 * row_groups  # three epochs, and what was read ahead
