"""Normalizers at other temperatures: computed from logits, stored, read, and held to what they can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import build_plan, build_records, put_shard

from logitstore.errors import CorruptShardError, InvalidSignalError, ShapeError
from logitstore.records import Record, RecordAddress, RecordBatch
from logitstore.shard.codec import Codec, CompactCodec, Float16Codec, Float32Codec, encode_batch
from logitstore.shard.invariants import find_violations
from logitstore.shard.layout import FORMAT_VERSION, ShardHeader, build_batch, build_schema, build_table, list_columns
from logitstore.shard.reader import decode_row_group, read_footer
from logitstore.shard.writer import ShardSettings, write_shard
from logitstore.store.commit import commit_unit
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import write_manifest
from logitstore.store.plan import create_plan
from logitstore.store.verify import verify_store
from logitstore.teacher.draws import DrawKeys
from logitstore.teacher.protocol import GivenIdsMethod, HeadTailMethod, Method, SampleMethod, TopKMethod
from logitstore.teacher.signal_columns import SignalColumns
from logitstore.teacher.sparsify import SparseRows, sparsify
from tools.method_text import describe_method

GRID = (1.5, 2.0, 4.0, 100.0)
METHODS: list[Method] = [
    TopKMethod(k=8, temperatures=GRID),
    TopKMethod(k=2000, temperatures=GRID),
    TopKMethod(k=20, top_p=0.5, temperatures=GRID),
    SampleMethod(num_draws=20, temperatures=GRID),
    HeadTailMethod(threshold=0.05, temperatures=GRID),
]
CODECS: list[Codec] = [Float32Codec(), Float16Codec(), CompactCodec()]


def build_header(codec: Codec, vocab_size: int = 50, temperatures: tuple[float, ...] = GRID) -> ShardHeader:
    return ShardHeader(
        format_version=FORMAT_VERSION,
        unit=0,
        plan_fingerprint="f" * 64,
        vocab_size=vocab_size,
        codec=codec,
        temperatures=temperatures,
    )


def draw_logits(seed: int, rows: int, vocab_size: int, spread: float) -> torch.Tensor:
    """Rows of all widths up to `spread`, some ids impossible, some masked by a finite number."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab_size, generator=generator) * spread * torch.rand(rows, 1, generator=generator)
    logits[0, 1:3] = -torch.inf
    logits[1, 1:3] = torch.finfo(torch.float32).min
    return logits


def cut(logits: torch.Tensor, next_ids: torch.Tensor, method: Method) -> SparseRows:
    positions = torch.arange(len(logits))
    return sparsify(logits, next_ids, method, DrawKeys(keys=torch.full_like(positions, 3), positions=positions))


def compute_reference(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return (logits.double().log_softmax(-1) / temperature).logsumexp(-1)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
@settings(deadline=None, max_examples=30)  # the first call loads torch
@given(seed=st.integers(0, 2**31), vocab_size=st.integers(5, 3000), spread=st.sampled_from([0.0, 1.0, 5.0, 60.0]))
def test_normalizers_of_any_logits_match_float64(method: Method, seed: int, vocab_size: int, spread: float) -> None:
    logits = draw_logits(seed, 6, vocab_size, spread)
    found = cut(logits, torch.zeros(6, dtype=torch.int64), method).tempered_logsumexp
    assert found is not None
    assert found.dtype == torch.float32
    for column, temperature in zip(found.T, GRID, strict=True):
        expected = compute_reference(logits, temperature)
        assert (column - expected).abs().max() < 1e-5


def test_normalizers_of_a_large_vocabulary_match_float64() -> None:
    logits = draw_logits(5, 4, 151_936, 4.0)
    found = cut(logits, torch.zeros(4, dtype=torch.int64), TopKMethod(temperatures=(2.0, 4.0))).tempered_logsumexp
    assert found is not None
    expected = torch.stack([compute_reference(logits, temperature) for temperature in (2.0, 4.0)], dim=-1)
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.kind)
@settings(deadline=None, max_examples=30)  # the first call loads torch
@given(seed=st.integers(0, 2**31), vocab_size=st.integers(5, 400), spread=st.sampled_from([0.0, 1.0, 5.0, 60.0]))
def test_signals_of_any_logits_are_stored_as_the_codec_promises(
    method: Method, codec: Codec, seed: int, vocab_size: int, spread: float
) -> None:
    logits = draw_logits(seed, 6, vocab_size, spread)
    token_ids = torch.randint(0, vocab_size, (7,), generator=torch.Generator().manual_seed(seed))
    [signal] = SignalColumns.from_rows(cut(logits, token_ids[1:], method)).split(np.array([0, 6]))
    record = Record(
        address=RecordAddress(unit=0, index=0),
        token_ids=token_ids.numpy().astype(np.int32),
        loss_mask=np.ones(6, dtype=bool),
        signal=signal,
    )
    header = build_header(codec, vocab_size).model_copy(update={"is_drawn": method.is_drawn})
    batch = RecordBatch.from_records([record])
    encoded, values = encode_batch(codec, batch, where="test")
    assert [str(violation) for violation in find_violations(encoded, header)] == []
    found = build_batch(build_table(encoded, values, build_schema(header)), codec, GRID)
    assert found.temperatures == GRID
    assert found.tempered_logsumexp is not None
    assert batch.tempered_logsumexp is not None
    error = np.abs(found.tempered_logsumexp.astype(np.float64) - batch.tempered_logsumexp)
    assert (error <= codec.bound_scalar(batch.tempered_logsumexp)).all()


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.kind)
def test_shard_with_temperatures_is_read_as_it_was_written(tmp_path: Path, codec: Codec) -> None:
    records = build_records(9, temperatures=GRID)
    path, header = tmp_path / "shard.parquet", build_header(codec)
    write_shard(path, records, header, ShardSettings(codec=codec, row_group_bytes=500))
    assert pq.read_table(path).column_names == list_columns(header, with_means=True)
    assert list_columns(header)[-1] == "tempered_logsumexp"
    data = path.read_bytes()
    metadata, found_header = read_footer(data, "test")
    assert found_header == header
    found = [
        record
        for index in range(metadata.num_row_groups)
        for record in decode_row_group(metadata, header, index, 0, data, with_documents=True, where="test")
    ]
    assert len(found) == len(records)
    for record, wanted in zip(found, records, strict=True):
        assert record.signal.temperatures == GRID
        np.testing.assert_array_equal(
            record.signal.tempered_logsumexp, codec.round(np.asarray(wanted.signal.tempered_logsumexp))
        )


def test_shard_without_temperatures_says_nothing_of_them(tmp_path: Path) -> None:
    header = build_header(Float32Codec(), temperatures=())
    assert b"temperatures" not in build_schema(header).metadata[b"logitstore"]
    assert "tempered_logsumexp" not in list_columns(header)
    assert "temperatures" not in TopKMethod(k=3).model_dump_json()


@pytest.mark.parametrize(
    ("position", "change", "found"),
    [
        (0, 0.5, "not one that support and tail allow"),
        (0, -0.5, "not one that support and tail allow"),
        (3, np.nan, "not one that support and tail allow"),
        (2, np.inf, "not one that support and tail allow"),
    ],
)
def test_wrong_normalizer_is_not_written(tmp_path: Path, position: int, change: float, found: str) -> None:
    [record] = build_records(1, ragged=False, temperatures=GRID, top_k=40)
    values = np.array(record.signal.tempered_logsumexp)
    values[position, 1] += change
    wrong = replace(record, signal=replace(record.signal, tempered_logsumexp=values))
    with pytest.raises(InvalidSignalError, match=f"position {position}: the normalizer at temperature 2 is {found}"):
        write_shard(tmp_path / "x", [wrong], build_header(Float32Codec()), ShardSettings(codec=Float32Codec()))


def test_normalizer_below_the_entropys_share_is_found() -> None:
    """A sample keeps nothing, so that only the entropy tells that a normalizer is too small."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    token_ids = torch.arange(5)
    rows = cut(logits, token_ids[1:], SampleMethod(temperatures=GRID))
    signal = SignalColumns.from_rows(rows).split(np.array([0, 4]))
    assert signal[0].tempered_logsumexp is not None
    record = Record(
        address=RecordAddress(unit=0, index=0),
        token_ids=token_ids.numpy().astype(np.int32),
        loss_mask=np.ones(4, dtype=bool),
        signal=replace(signal[0], tempered_logsumexp=signal[0].tempered_logsumexp * np.float32(0.8)),
    )
    header = build_header(Float32Codec()).model_copy(update={"is_drawn": True})
    whats = [violation.what for violation in find_violations(RecordBatch.from_records([record]), header)]
    assert "the normalizer at temperature 2 is too small for the entropy" in whats


def test_batch_of_other_temperatures_than_the_shards_is_refused(tmp_path: Path) -> None:
    records = build_records(2, temperatures=(2.0,))
    with pytest.raises(InvalidSignalError, match=r"tempered_logsumexp: expected .* at temperatures"):
        write_shard(tmp_path / "x", records, build_header(Float32Codec()), ShardSettings(codec=Float32Codec()))


def test_records_of_different_temperatures_are_not_joined() -> None:
    with pytest.raises(ShapeError, match="expected the same temperatures in all"):
        RecordBatch.from_records([*build_records(1, temperatures=(2.0,)), *build_records(1)])


def test_signal_with_a_missing_column_is_refused() -> None:
    [record] = build_records(1, temperatures=(2.0, 4.0))
    assert record.signal.tempered_logsumexp is not None
    with pytest.raises(ShapeError, match="tempered_logsumexp"):
        replace(record.signal, tempered_logsumexp=record.signal.tempered_logsumexp[:, :1])
    with pytest.raises(ShapeError, match="tempered_logsumexp"):
        replace(record.signal, temperatures=())


def test_column_of_another_length_is_found(tmp_path: Path) -> None:
    header = build_header(Float32Codec())
    path = tmp_path / "shard.parquet"
    write_shard(path, build_records(3, temperatures=GRID), header, ShardSettings(codec=Float32Codec()))
    data = path.read_bytes()
    metadata, _ = read_footer(data, "test")
    other = header.model_copy(update={"temperatures": GRID[:2]})
    with pytest.raises(CorruptShardError, match="has not 2 values for each position"):
        decode_row_group(metadata, other, 0, 0, data, with_documents=False, where="test")


def test_store_with_temperatures_is_verified_and_sliced(tmp_path: Path) -> None:
    files = StoreFiles(str(tmp_path / "store"))
    plan = create_plan(files, build_plan(1, method=TopKMethod(k=8, temperatures=GRID)))
    records = build_records(5, temperatures=GRID)
    commit_unit(files, put_shard(files, plan, 0, records, "a", tmp_path))
    write_manifest(files, plan.compute_fingerprint())
    assert verify_store(files).is_clean
    store = LogitStore.open(files.url)
    assert store.plan.temperatures == GRID
    assert store.compute_statistics().column_bytes["tempered_logsumexp"] > 0
    batch = store.read_row_group(0)
    part = batch.slice(1, 3)
    for record, wanted in zip(part, records[1:3], strict=True):
        np.testing.assert_array_equal(record.signal.tempered_logsumexp, wanted.signal.tempered_logsumexp)


def test_method_is_described_with_its_temperatures() -> None:
    assert describe_method(TopKMethod(k=8)) == "top-k, k = 8"
    tempered = describe_method(TopKMethod(k=8, temperatures=(2.0, 4.5)))
    assert tempered == "top-k, k = 8; normalizers at temperature 2, 4.5"
    assert describe_method(GivenIdsMethod()) == "ids that the corpus gives"


def test_plan_with_and_without_temperatures_are_of_different_stores() -> None:
    plain, tempered = build_plan(1), build_plan(1, method=TopKMethod(k=8, temperatures=(2.0,)))
    assert plain.compute_fingerprint() != tempered.compute_fingerprint()
    assert any("method.temperatures" in line for line in plain.find_differences(tempered))


@pytest.mark.parametrize("temperatures", [(1.0,), (0.5,), (4.0, 2.0), (2.0, 2.0), (101.0,)])
def test_temperatures_that_mean_nothing_are_refused(temperatures: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="temperatures"):
        TopKMethod(temperatures=temperatures)
