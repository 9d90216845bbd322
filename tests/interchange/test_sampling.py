"""Data sets that are refused before anything is written, by what their first rows and their columns say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from interchange.made_up_data import FLOAT32, build_distillkit_rows, import_all, list_supports, plan_import, write_rows
from made_up import VOCAB_SIZE, build_records

from logitstore.errors import ConfigError
from logitstore.interchange.axolotl import AxolotlLayout
from logitstore.records import Record, RecordBatch


def build_axolotl_folder(folder: Path, alignment: str) -> list[Record]:
    """axolotl data whose likeliest entry is the token that comes next, mostly."""
    records = build_records(20, ragged=False, vocab_size=VOCAB_SIZE)
    for record in records:
        signal = record.signal
        for position in range(record.num_positions):
            ids = signal.support_ids[8 * position : 8 * position + 8]
            if record.token_ids[position + 1] not in ids:
                ids[0] = record.token_ids[position + 1]
    layout = AxolotlLayout(top_k=8, alignment=alignment, is_renormalized=False)
    folder.mkdir()
    pq.write_table(layout.build_table(RecordBatch.from_records(records)), folder / "part.parquet")
    return records


def test_shifted_axolotl_data_is_refused_and_read_when_told(tmp_path: Path) -> None:
    records = build_axolotl_folder(tmp_path / "old", "same")
    with pytest.raises(ConfigError, match=r"token t itself among 1?\d\d%.*shifted by one.*--alignment same"):
        plan_import(tmp_path / "old", tmp_path / "in", layout="axolotl")
    data_set = plan_import(tmp_path / "old", tmp_path / "in", layout="axolotl", alignment="same", shard=FLOAT32)
    assert data_set.plan.sample.next_hits == 1.0
    store = import_all(data_set, tmp_path / "in")
    for mine, theirs in zip(records, store, strict=True):
        for support, found in zip(list_supports(mine, 8), list_supports(theirs, 8), strict=True):
            assert found == pytest.approx(support, abs=1e-6)


def test_logits_in_place_of_logprobs_are_refused(tmp_path: Path) -> None:
    rows = build_distillkit_rows(4)
    for row in rows:
        row["top_values"] = [[value + 20 for value in values] for values in row["top_values"]]
    write_rows(tmp_path / "data/part.parquet", rows)
    with pytest.raises(ConfigError, match="expected logprobs, found values whose exponentials sum to"):
        plan_import(tmp_path / "data", tmp_path / "in", layout="distillkit")


@pytest.mark.parametrize(
    ("columns", "layout", "message"),
    [
        ({"input_ids": [[1, 2]], "target_logprobs": [[[0.0]]]}, "distillkit", "expected the columns.*--layout axolotl"),
        ({"messages": ["x"], "logprobs": ["y"]}, "axolotl", "import what axolotl prepared of it"),
        (
            {"input_ids": [[1]], "packed_indices": [[[1]]], "exact_values": [[[0.0]]], "coeffs": [[[0.0]]]},
            "distillkit",
            "older compressed logits",
        ),
        (
            {"input_ids": ["a b"], "token_ids": [[[1]]], "top_values": [[[0.0]]]},
            "distillkit",
            "column 'input_ids': expected lists of numbers, found string",
        ),
        (
            {"input_ids": [[1]], "token_ids": [[[1]]], "top_values": [[[0.0]]]},
            "distillkit",
            "expected rows of the layout, found none that can be used .too_short",
        ),
    ],
)  # fmt: skip
def test_data_of_another_layout_is_refused_with_advice(
    columns: dict[str, Any], layout: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "data/part.parquet")
    with pytest.raises(ConfigError, match=message):
        plan_import(tmp_path / "data", tmp_path / "in", layout=layout)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "distillkit-compressed"}, "expected a compression config, found none: give the compression_config"),
        ({"layout": "distillkit", "alignment": "same"}, "alignment 'same': expected layout axolotl"),
        ({"layout": "distillkit"}, "expected at least one file, found none(.|\n)*to_parquet"),
    ],
)
def test_import_that_cannot_begin_says_why(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(ConfigError, match=message):
        plan_import(tmp_path / "data", tmp_path / "in", **settings)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad_row", [0, 3])
def test_bad_value_in_one_row_of_four_costs_that_row_alone(bad: float, bad_row: int, tmp_path: Path) -> None:
    rows = build_distillkit_rows(4)
    rows[bad_row]["top_values"][2][1] = bad
    write_rows(tmp_path / "data/part.parquet", rows, row_group_size=4)
    data_set = plan_import(tmp_path / "data", tmp_path / "in", layout="distillkit")
    sample = data_set.plan.sample
    assert (sample.rows, sample.normalization, sample.next_hits) == (3, "vocabulary", 1.0)
    assert 0 < sample.median_mass <= 1
    store = import_all(data_set, tmp_path / "in")
    assert store.compute_statistics().dead_letters == {"invalid_signal": 1}
    assert len(store) == 3


def test_data_without_a_row_of_sound_values_is_refused(tmp_path: Path) -> None:
    rows = build_distillkit_rows(2)
    for row in rows:
        row["top_values"][0][0] = float("nan")
    write_rows(tmp_path / "data/part.parquet", rows)
    with pytest.raises(ConfigError, match=r"none that can be used \(invalid_signal: expected logprobs, found NaN"):
        plan_import(tmp_path / "data", tmp_path / "in", layout="distillkit")
