"""The identity of a plan: equal for the same records, whatever later releases add."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_up import build_plan

from logitstore.errors import IncompatibleStoreError
from logitstore.store.files import StoreFiles
from logitstore.store.plan import PLAN_PATH, create_plan, read_plan
from logitstore.store.sealed_json import seal


def test_plan_without_a_setting_that_a_later_release_added_keeps_its_fingerprint_and_is_joined(tmp_path: Path) -> None:
    files = StoreFiles(str(tmp_path))
    values = json.loads(build_plan(2).model_dump_json())
    del values["shard"]["compression_level"]
    files.create(PLAN_PATH, seal(json.dumps(values).encode()))
    older = read_plan(files)
    assert older.compute_fingerprint() != build_plan(2).compute_fingerprint()
    joined = create_plan(files, build_plan(2))
    assert joined.compute_fingerprint() == older.compute_fingerprint()
    with pytest.raises(IncompatibleStoreError, match=r"shard\.compression_level\n    in the store:     7"):
        create_plan(files, build_plan(2, shard={**values["shard"], "compression_level": 3}))


def test_plan_just_made_has_the_fingerprint_it_has_when_read(tmp_path: Path) -> None:
    files = StoreFiles(str(tmp_path))
    made = create_plan(files, build_plan(2, method={"kind": "top_k", "k": 8, "top_p": 1}))
    assert made.compute_fingerprint() == read_plan(files).compute_fingerprint()


def test_promise_of_a_single_writer_is_not_part_of_what_a_store_is(tmp_path: Path) -> None:
    files = StoreFiles(str(tmp_path))
    made = create_plan(files, build_plan(2))
    assert create_plan(files, build_plan(2, single_writer=True)).compute_fingerprint() == made.compute_fingerprint()
