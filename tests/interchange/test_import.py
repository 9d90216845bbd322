"""Stores made of data sets: whole stores that verify, say what the rows say, and account for every row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from interchange.made_up_data import (
    FLOAT32,
    build_distillkit_rows,
    export_store,
    ignore,
    import_all,
    list_supports,
    plan_import,
    renormalize,
    write_rows,
)
from made_up import VOCAB_SIZE

from logitstore.errors import IncompatibleStoreError, OutsideError
from logitstore.interchange.import_check import check_import
from logitstore.interchange.importing import DataSetImport
from logitstore.records import RecordBatch
from logitstore.store.commit import read_commit
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.verify import verify_store

BuildStore = Callable[..., LogitStore]


@pytest.mark.parametrize("codec", ["float32", "float16", "compact"])
@pytest.mark.parametrize("layout", ["distillkit", "distillkit-compressed", "axolotl"])
def test_store_that_went_out_and_came_in_says_the_same(
    layout: str, codec: str, build_store: BuildStore, tmp_path: Path
) -> None:
    store = build_store()
    over_vocabulary = {"renormalize": False} if layout == "axolotl" else {}
    exact = {"d": VOCAB_SIZE, "k": 8, "exact_k": 8, "delta_encoding": False}
    compression = {"compression": exact} if layout == "distillkit-compressed" else {}
    export_store(store, tmp_path / "out", layout=layout, **over_vocabulary, **compression)
    settings = {"layout": layout, "shard": {"codec": {"kind": codec}}, **compression}
    data_set = plan_import(tmp_path / "out", tmp_path / "in", **settings)
    imported = import_all(data_set, tmp_path / "in")
    assert verify_store(StoreFiles(imported.url)).problems == ()
    assert imported.plan.unknown_scalars == ("entropy", "next_token_logprob")
    codec_used = imported.plan.shard.codec
    for mine, theirs in zip(store, imported, strict=True):
        assert theirs.token_ids.tolist() == mine.token_ids.tolist()
        assert theirs.loss_mask.tolist() == mine.loss_mask.tolist()
        bounds = list(codec_used.bound_support(RecordBatch.from_records([mine])))
        for support, found in zip(list_supports(mine, 8), list_supports(theirs, 8), strict=True):
            for token_id, logprob in support.items():
                assert abs(found.pop(token_id) - logprob) <= bounds.pop(0) + 1e-6
            assert not found
        error = np.abs(theirs.signal.tail_logprob - mine.signal.tail_logprob)
        assert (error <= codec_used.bound_scalar(mine.signal.tail_logprob) + 1e-4).all()
    agreement = check_import(imported, data_set, is_whole=True, report=ignore)
    assert agreement.positions == store.compute_statistics().positions
    assert agreement.beyond_bound == 0
    assert agreement.mean_kl < {"float32": 1e-9, "float16": 1e-6, "compact": 1e-4}[codec]


def test_axolotl_data_over_its_entries_is_recognised_and_has_no_tail(build_store: BuildStore, tmp_path: Path) -> None:
    store = build_store()
    export_store(store, tmp_path / "out", layout="axolotl", top_k=4)
    data_set = plan_import(tmp_path / "out", tmp_path / "in", layout="axolotl", shard=FLOAT32)
    assert (data_set.plan.rules.normalization, data_set.plan.rules.top_k) == ("support", 4)
    for mine, theirs in zip(store, import_all(data_set, tmp_path / "in"), strict=True):
        assert set(theirs.signal.tail_logprob.tolist()) == {-np.inf}
        for support, found in zip(list_supports(mine, 4), list_supports(theirs, 4), strict=True):
            assert found == pytest.approx(renormalize(support), rel=1e-6, abs=1e-6)


def test_polynomial_data_is_imported_as_its_decoder_reads_it(build_store: BuildStore, tmp_path: Path) -> None:
    store = build_store(ragged=False)
    config = {"d": 50, "k": 8, "exact_k": 2, "polynomial_terms": [0, 1], "delta_encoding": False}
    export_store(store, tmp_path / "out", layout="distillkit-compressed", compression=config)
    settings = {"layout": "distillkit-compressed", "compression": config}
    data_set = plan_import(tmp_path / "out", tmp_path / "in", **settings)
    imported = import_all(data_set, tmp_path / "in")
    assert verify_store(StoreFiles(imported.url)).is_clean
    assert imported.compute_statistics().dead_letters == {}
    assert check_import(imported, data_set, is_whole=True, report=ignore).beyond_bound == 0


def test_rows_that_cannot_be_used_are_dead_letters_with_file_and_row(tmp_path: Path) -> None:
    rows = build_distillkit_rows(9)
    rows[1]["input_ids"][3] = VOCAB_SIZE
    rows[2]["top_values"][4][0] = float("nan")
    rows[3]["top_values"][0] = [-0.1] * 8
    rows[4]["token_ids"].pop()
    rows[5]["input_ids"] = None
    rows[6]["input_ids"] = rows[6]["input_ids"][:1]
    rows[6]["token_ids"], rows[6]["top_values"] = [], []
    rows[7]["token_ids"][2][0] = -1
    path = tmp_path / "data/part.parquet"
    write_rows(path, rows)
    store = import_all(plan_import(tmp_path / "data", tmp_path / "in", layout="distillkit"), tmp_path / "in")
    assert verify_store(StoreFiles(store.url)).is_clean
    statistics = store.compute_statistics()
    assert statistics.documents == len(rows) == statistics.recorded_documents + sum(statistics.dead_letters.values())
    assert statistics.dead_letters == {"invalid_signal": 2, "malformed": 2, "token_out_of_range": 2, "too_short": 1}
    letters = read_commit(StoreFiles(store.url), 0).dead_letters
    assert [letter.document_id for letter in letters] == [f"{path}#{row}" for row in range(1, 8)]
    assert letters[0].detail == "row 1: token 3: expected ids below 50, found 50"
    assert [record.documents[0].document_id for record in store] == [f"{path}#0", f"{path}#8"]


def test_packed_rows_become_one_record_per_sequence(tmp_path: Path) -> None:
    [row] = build_distillkit_rows(1)
    tokens = len(row["input_ids"]) - 1
    row["input_ids"] = row["input_ids"][:tokens]
    row["attention_mask"] = [1] * 5 + [2] * (tokens - 5)
    write_rows(tmp_path / "data/part.parquet", [row])
    store = import_all(plan_import(tmp_path / "data", tmp_path / "in", layout="distillkit"), tmp_path / "in")
    assert [record.token_ids.tolist() for record in store] == [row["input_ids"][:5], row["input_ids"][5:]]
    assert [record.documents[0].document_offset for record in store] == [0, 5]
    assert store.compute_statistics().documents == store.compute_statistics().recorded_documents == 1


def test_import_that_was_stopped_goes_on_and_leaves_what_was_committed(tmp_path: Path) -> None:
    write_rows(tmp_path / "data/part.parquet", build_distillkit_rows(10))
    settings = {"layout": "distillkit", "unit_tokens": 26}
    stopped = plan_import(tmp_path / "data", tmp_path / "in", **settings)
    assert len(stopped.plan.store.build_unit_table()) == 5
    assert stopped.import_unit(0)
    commit = (tmp_path / "in/commits/0000000.json").read_bytes()
    again = plan_import(tmp_path / "data", tmp_path / "in", **settings)
    assert not again.import_unit(0)
    store = import_all(again, tmp_path / "in")
    assert (tmp_path / "in/commits/0000000.json").read_bytes() == commit
    assert len(store) == 10
    assert verify_store(StoreFiles(store.url)).is_clean


def test_import_that_fails_while_it_uploads_commits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "data/part.parquet", build_distillkit_rows(4))
    data_set = plan_import(tmp_path / "data", tmp_path / "in", layout="distillkit")

    def fail(self: StoreFiles, path: str, source: Path) -> None:
        raise OutsideError(f"{path}: storage failed; run the command again")

    with monkeypatch.context() as patch:
        patch.setattr(StoreFiles, "put_file", fail)
        with pytest.raises(OutsideError):
            data_set.import_unit(0)
    assert list((tmp_path / "in").glob("commits/*")) == []
    assert len(import_all(data_set, tmp_path / "in")) == 4


def test_import_with_other_settings_into_a_store_prints_both_sides(tmp_path: Path) -> None:
    write_rows(tmp_path / "data/part.parquet", build_distillkit_rows(4))
    plan_import(tmp_path / "data", tmp_path / "in", layout="distillkit")
    with pytest.raises(IncompatibleStoreError, match=r"vocabulary(.|\n)*in this capture: (.|\n)*support"):
        plan_import(tmp_path / "data", tmp_path / "in", layout="distillkit", normalization="support")


def test_import_of_a_changed_data_set_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "data/part.parquet", build_distillkit_rows(4))
    plan_import(tmp_path / "data", tmp_path / "in", layout="distillkit")
    write_rows(tmp_path / "data/part.parquet", build_distillkit_rows(5))
    with pytest.raises(IncompatibleStoreError, match=r"corpus\.files"):
        plan_import(tmp_path / "data", tmp_path / "in", layout="distillkit")


def test_check_of_a_store_that_says_something_else_counts_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "data/part.parquet", build_distillkit_rows(4))
    data_set = plan_import(tmp_path / "data", tmp_path / "in", layout="distillkit", shard=FLOAT32)
    store = import_all(data_set, tmp_path / "in")
    rules = replace(data_set.plan.rules, normalization="support", mass_tolerance=1.0)
    other = DataSetImport(StoreFiles(store.url), replace(data_set.plan, rules=rules))
    agreement = check_import(store, other, is_whole=False, report=ignore)
    assert agreement.beyond_bound == agreement.entries > 0
    assert agreement.first_beyond_bound is not None
    assert agreement.first_beyond_bound.startswith(f"{store.url}: record 0/0, position 0: expected -")


@pytest.mark.slow
def test_import_from_and_to_s3_is_clean(build_store: BuildStore, s3_url: str) -> None:
    export_store(build_store(f"{s3_url}/store"), f"{s3_url}/out", layout="distillkit")
    data_set = plan_import(f"{s3_url}/out", f"{s3_url}/in", layout="distillkit")
    store = import_all(data_set, f"{s3_url}/in")
    assert verify_store(StoreFiles(store.url)).is_clean
    assert check_import(store, data_set, is_whole=False, report=ignore).beyond_bound == 0
