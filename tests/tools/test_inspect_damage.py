"""`logitstore inspect` of records and shards that are damaged, half known, or in large company."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up import build_plan, build_records, put_shard

from logitstore.records import Record
from logitstore.store.commit import build_attempt, commit_unit
from logitstore.store.extension import PlanExtension, create_extension
from logitstore.store.files import StoreFiles
from logitstore.store.plan import create_plan, read_plan


def put_unit(folder: Path, change: Callable[[Record], Record], **plan: Any) -> tuple[StoreFiles, Path]:
    """A store of one unit without a manifest, and its shard."""
    files = StoreFiles(str(folder / "store"))
    created = create_plan(files, build_plan(1, **plan))
    records = [change(record) for record in build_records(4)]
    commit_unit(files, put_shard(files, created, 0, records, build_attempt(), folder))
    [shard] = Path(files.url, "data").iterdir()
    return files, shard


def forget(record: Record) -> Record:
    """The record without entropies, and with none of its next tokens but the first known."""
    unknown = np.full(record.num_positions, np.nan, dtype=np.float32)
    known = np.where(np.arange(record.num_positions) == 0, record.signal.next_token_logprob, unknown)
    signal = dataclasses.replace(record.signal, entropy=unknown, next_token_logprob=known.astype(np.float32))
    return dataclasses.replace(record, signal=signal)


def test_unknown_scalars_of_a_shard_by_itself_are_unknown(tmp_path: Path, logitstore: Any) -> None:
    _, shard = put_unit(tmp_path, forget, unknown_scalars=("entropy", "next_token_logprob"))
    alone = tmp_path / "alone.parquet"
    alone.write_bytes(shard.read_bytes())
    for path in (shard, alone):
        view = logitstore.json("inspect", path, "--record", 1, "--positions", ":")
        assert (view["mean_entropy"], view["teacher_loss"]) == (None, None)
        assert {position["entropy"] for position in view["positions"]} == {None}
        assert "unknown" in logitstore("inspect", path, "--record", 1)[0]


def test_loss_of_a_record_whose_tokens_are_all_held_impossible_is_unknown(tmp_path: Path, logitstore: Any) -> None:
    def hold_impossible(record: Record) -> Record:
        signal, absent = record.signal, np.setdiff1d(np.arange(50), record.signal.support_ids)[0]
        token_ids = np.full(record.num_positions + 1, absent, dtype=np.int32)
        none = np.full(record.num_positions, -np.inf, dtype=np.float32)
        return dataclasses.replace(
            record, token_ids=token_ids, signal=dataclasses.replace(signal, next_token_logprob=none)
        )

    files, _ = put_unit(tmp_path, hold_impossible)
    assert logitstore.json("inspect", files.url, "--record", 1)["teacher_loss"] is None


@pytest.mark.parametrize("options", [["--record", "1/7"], ["--dead-letters"]])
def test_store_with_a_damaged_manifest_still_shows_what_is_whole(
    options: list[str], growing_store: StoreFiles, logitstore: Any
) -> None:
    whole = logitstore.json("inspect", growing_store.url, *options)
    Path(growing_store.url, "manifest-000001.parquet").write_bytes(b"{ damaged")
    found = logitstore.json("inspect", growing_store.url, *options, exit_code=3)
    [trouble] = found.pop("unreadable")
    assert "manifest-000001.parquet" in trouble
    assert found == {name: value for name, value in whole.items() if name != "unreadable"}
    assert "not counted: " in logitstore("inspect", growing_store.url, *options, exit_code=3)[1]


def test_shard_in_a_folder_of_many_is_found_without_listing_them(
    growing_store: StoreFiles, logitstore: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = sorted(Path(growing_store.url, "data").iterdir())[1]

    def refuse(self: StoreFiles, folder: str) -> Any:
        raise AssertionError(folder)

    monkeypatch.setattr(StoreFiles, "list", refuse)
    found = logitstore.json("inspect", shard)
    assert found["bytes"] == shard.stat().st_size
    assert found["mean_support"] == found["support_entries"] / found["positions"]
    assert "support entries" in logitstore("inspect", shard)[0]


def test_commits_are_listed_once(growing_store: StoreFiles, logitstore: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []
    list_files = StoreFiles.list

    def count(self: StoreFiles, folder: str) -> Any:
        listed.append(folder)
        return list_files(self, folder)

    monkeypatch.setattr(StoreFiles, "list", count)
    for options in ([], ["--manifest", 1]):
        listed.clear()
        found = logitstore.json("inspect", growing_store.url, *options)
        assert listed.count("commits") == 1
        commits = sorted(Path(growing_store.url, "commits").iterdir())[: found["units"]]
        of_commits = sum(path.stat().st_size for path in commits)
        plan, manifest = (
            Path(growing_store.url, name).stat().st_size for name in ("plan.json", "manifest-000001.parquet")
        )
        assert found["bytes"] == found["shard_bytes"] + of_commits + plan + (manifest if options else 0)


def test_bytes_of_a_store_that_was_given_more_corpus_count_the_additions(
    growing_store: StoreFiles, logitstore: Any
) -> None:
    before = logitstore.json("inspect", growing_store.url)["bytes"]
    plan = read_plan(growing_store)
    first_unit = len(plan.build_unit_table())
    values = {"plan_fingerprint": plan.compute_fingerprint(), "first_file": len(plan.files), "first_unit": first_unit}
    assert create_extension(growing_store, 2, PlanExtension(**values, files=plan.files, units=plan.units))
    addition = Path(growing_store.url, "plan-000002.json").stat().st_size
    assert logitstore.json("inspect", growing_store.url)["bytes"] == before + addition


def test_record_and_dead_letters_at_once_are_refused(growing_store: StoreFiles, logitstore: Any) -> None:
    _, stderr = logitstore("inspect", growing_store.url, "--record", 0, "--dead-letters", exit_code=2)
    assert "expected one of --record and --dead-letters, found both" in stderr
