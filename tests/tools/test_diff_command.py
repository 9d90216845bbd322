"""`logitstore diff`: what it says of two stores is what their signals say, position by position."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up import VOCAB_SIZE, build_identity, build_plan, build_records, build_signal, put_shard
from made_up_draws import build_drawn_records

from logitstore.comparison import compare_signals
from logitstore.records import Record, RecordBatch
from logitstore.shard.codec import Codec, CompactCodec, Float32Codec
from logitstore.shard.writer import ShardSettings
from logitstore.store.commit import build_attempt, commit_unit
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import write_manifest
from logitstore.store.plan import create_plan
from logitstore.teacher.protocol import GivenIdsMethod, Method, SampleMethod, TopKMethod
from tools.store_diff import choose_row_groups

Fill = Callable[..., LogitStore]


def speak(unit: int, seed: int) -> list[Record]:
    """What one of many teachers says of a unit's records; every third position is not taught."""
    generator = np.random.default_rng([seed, unit, 1])
    return [
        replace(
            record,
            loss_mask=np.arange(record.num_positions) % 3 != 2,
            signal=build_signal(generator.normal(0, 3, (record.num_positions, VOCAB_SIZE)), record.token_ids[1:], 8),
        )
        for record in build_records(20, unit=unit, vocab_size=VOCAB_SIZE)
    ]


@pytest.fixture
def fill(tmp_path: Path) -> Fill:
    """Function that makes a store of three units, of two sources, of what a teacher says."""

    def fill(
        name: str,
        say: Callable[[int], list[Record]],
        codec: Codec = Float32Codec(),  # noqa: B008  # frozen
        method: Method = TopKMethod(k=8),  # noqa: B008  # frozen
        **teacher: object,
    ) -> LogitStore:
        files = StoreFiles(str(tmp_path / name))
        shard = ShardSettings(codec=codec, row_group_bytes=1500)
        identity = build_identity(**teacher)
        plan = build_plan(3, sources=("code", "text"), shard=shard, method=method, teacher=identity)
        plan = create_plan(files, plan)
        for unit in range(3):
            commit_unit(files, put_shard(files, plan, unit, say(unit), build_attempt(), tmp_path))
        write_manifest(files, plan.compute_fingerprint())
        return LogitStore.open(files.url)

    return fill


def compare_records(first: LogitStore, second: LogitStore) -> dict[str, np.ndarray]:
    """Distances at all positions that are taught in both, record by record."""
    parts: list[dict[str, np.ndarray]] = []
    for one, two in zip(first, second, strict=True):
        found = compare_signals(RecordBatch.from_records([one]), RecordBatch.from_records([two]))
        taught = one.loss_mask & two.loss_mask & found.is_comparable
        parts.append({name: values[taught] for name, values in vars(found).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_figures_are_those_of_all_taught_positions(fill: Fill, logitstore: Any) -> None:
    first, second = (fill(str(seed), lambda unit, seed=seed: speak(unit, seed)) for seed in range(2))
    diff = logitstore.json("diff", first.url, second.url)
    expected = compare_records(first, second)
    assert diff["records"] == len(first)
    assert diff["positions_taught"] == diff["distances"]["positions"] == len(expected["kl"])
    for name in ("kl", "reverse_kl", "total_variation"):
        assert diff["distances"][name] == pytest.approx(expected[name].mean(), rel=1e-9)
    assert diff["distances"]["agreement"] == pytest.approx(expected["agrees"].mean())
    for share, end in diff["kl_quantiles"].items():
        exact = np.quantile(expected["kl"], float(share), method="inverted_cdf")
        assert exact <= end <= exact * 1.13
    sources = diff["sources"]
    assert sum(source["positions"] for source in sources.values()) == len(expected["kl"])
    weighted = sum(source["kl"] * source["positions"] for source in sources.values())
    assert weighted / len(expected["kl"]) == pytest.approx(diff["distances"]["kl"])
    assert diff["first"]["teacher_loss"] != diff["second"]["teacher_loss"]


def test_most_different_positions_are_the_farthest_in_order(fill: Fill, logitstore: Any) -> None:
    first, second = (fill(str(seed), lambda unit, seed=seed: speak(unit, seed)) for seed in range(2))
    found = logitstore.json("diff", first.url, second.url, "--top", 7)["most_different"]
    farthest = np.sort(compare_records(first, second)["kl"])[::-1][:7]
    np.testing.assert_allclose([entry["kl"] for entry in found], farthest)
    for entry in found:
        unit, index = map(int, entry["record"].split("/"))
        [record] = [one for one in first if (one.address.unit, one.address.index) == (unit, index)]
        position = entry["first"]["position"]
        assert record.loss_mask[position]
        ids, logprobs = record.signal.support_at(position)
        assert [candidate["token_id"] for candidate in entry["first"]["candidates"]] == ids[:3].tolist()
        assert entry["first"]["candidates"][0]["probability"] == pytest.approx(np.exp(logprobs[0]), rel=1e-6)
        assert entry["second"]["candidates"] != entry["first"]["candidates"]


def test_store_and_itself_in_another_codec_are_near(fill: Fill, logitstore: Any) -> None:
    exact = fill("exact", lambda unit: speak(unit, 0))
    compact = fill("compact", lambda unit: speak(unit, 0), CompactCodec())
    same = logitstore.json("diff", exact.url, exact.url, "--max-kl", "0", "--min-agreement", "1")
    assert same["distances"]["kl"] == 0
    near = logitstore.json("diff", exact.url, compact.url, "--max-kl", "1e-4", "--min-agreement", "0.99")
    assert 0 < near["distances"]["kl"] < 5e-5
    assert (near["first"]["codec"], near["second"]["codec"]) == ("float32", "compact")


def test_stores_beyond_a_bound_end_with_3_and_the_figures(fill: Fill, logitstore: Any) -> None:
    first, second = (fill(str(seed), lambda unit, seed=seed: speak(unit, seed)) for seed in range(2))
    stdout, stderr = logitstore("diff", first.url, second.url, "--max-kl", "0.01", exit_code=3)
    assert "nats at least" in stdout
    assert "expected a mean KL up to 0.01 nats, found" in stderr
    _, stderr = logitstore("diff", first.url, second.url, "--min-agreement", "0.99", exit_code=3)
    assert "one likeliest token at 99.0% of positions, found" in stderr


def test_stores_of_other_sequences_are_refused_with_both_sides(fill: Fill, logitstore: Any) -> None:
    first = fill("first", lambda unit: speak(unit, 0))
    second = fill("second", lambda unit: speak(unit, 0), tokenizer_fingerprint="f" * 64)
    _, stderr = logitstore("diff", first.url, second.url, exit_code=3)
    assert "expected the sequences of" in stderr
    assert "tokenizer" in stderr


def test_drawn_stores_without_kept_tokens_are_compared_by_losses_alone(fill: Fill, logitstore: Any) -> None:
    store = fill("drawn", lambda unit: build_drawn_records(20, "sample", unit=unit), method=SampleMethod())
    diff = logitstore.json("diff", store.url, store.url)
    assert (diff["distances"]["positions"], diff["most_different"]) == (0, [])
    assert diff["positions_taught"] > 0
    assert "unknown: no position has kept tokens" in logitstore("diff", store.url, store.url)[0]
    _, stderr = logitstore("diff", store.url, store.url, "--max-kl", "1", exit_code=3)
    assert "expected positions with kept tokens in both stores, found none" in stderr


def test_part_of_the_records_is_spread_over_the_store(fill: Fill, logitstore: Any) -> None:
    first, second = (fill(str(seed), lambda unit, seed=seed: speak(unit, seed)) for seed in range(2))
    part = logitstore.json("diff", first.url, second.url, "--records", 20)
    assert 20 <= part["records"] < len(first) / 2
    assert set(part["sources"]) == {"code", "text"}


def test_chosen_row_groups_are_even_and_enough() -> None:
    records = np.full(1000, 7)
    chosen = choose_row_groups(records, 70)
    np.testing.assert_array_equal(chosen, np.arange(50, 1000, 100))
    np.testing.assert_array_equal(choose_row_groups(records, 7000), np.arange(1000))
    np.testing.assert_array_equal(choose_row_groups(records, None), np.arange(1000))
    assert choose_row_groups(records, 1).tolist() == [500]


def test_quantiles_among_positions_of_infinite_distance_are_infinite(fill: Fill, logitstore: Any) -> None:
    def hold_impossible(unit: int) -> list[Record]:
        records = []
        for record in speak(unit, 0):
            logits = np.full((record.num_positions, VOCAB_SIZE), -np.inf)
            logits[:, :2] = 0.0
            with np.errstate(invalid="ignore"):
                signal = build_signal(logits, record.token_ids[1:], 2)
            entropy = np.full(record.num_positions, np.log(2), dtype=np.float32)
            records.append(replace(record, signal=replace(signal, entropy=entropy)))
        return records

    first, second = fill("first", lambda unit: speak(unit, 0)), fill("second", hold_impossible)
    diff = logitstore.json("diff", first.url, second.url)
    assert diff["distances"]["infinite"] == diff["distances"]["positions"] > 0
    assert set(diff["kl_quantiles"].values()) == {None}
    assert "50%: ∞, 90%: ∞" in logitstore("diff", first.url, second.url)[0]


def test_agreement_of_stores_that_keep_other_tokens_than_the_likeliest_is_unknown(fill: Fill, logitstore: Any) -> None:
    first = fill("first", lambda unit: speak(unit, 0))
    second = fill("second", lambda unit: speak(unit, 0), method=GivenIdsMethod())
    diff = logitstore.json("diff", first.url, second.url)
    assert diff["distances"]["agreement"] is None
    assert {one["agreement"] for one in diff["sources"].values()} == {None}
    stdout, stderr = logitstore("diff", first.url, second.url, "--min-agreement", "0.5", exit_code=3)
    assert re.search(r"same first\s+unknown", stdout)
    assert "found a store that keeps other tokens" in stderr
