"""Values without their lists: those that Arrow reads with them, and damage is an error and never a crash."""

from __future__ import annotations

import base64
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import build_records
from made_up_draws import build_drawn_records
from pyarrow.parquet import encryption

from logitstore.errors import CorruptShardError
from logitstore.records import Record, RecordBatch
from logitstore.shard import compact, compiled
from logitstore.shard.codec import Codec, CompactCodec, Float16Codec, Float32Codec
from logitstore.shard.layout import FORMAT_VERSION, SPLIT_COLUMNS, ShardHeader, list_columns
from logitstore.shard.pages import Pages, _copy_used, read_pages
from logitstore.shard.reader import _read_pages, decode_row_group, read_footer
from logitstore.shard.writer import ShardSettings, write_shard

CODECS: list[Codec] = [Float32Codec(), Float16Codec(), CompactCodec()]


def empty_support(record: Record) -> Record:
    """The record as if nothing were known at any of its positions."""
    signal, nothing = record.signal, np.zeros(record.num_positions, dtype=np.float32)
    return replace(
        record,
        signal=replace(
            signal,
            support_counts=np.zeros_like(signal.support_counts),
            support_ids=signal.support_ids[:0],
            support_logprobs=signal.support_logprobs[:0],
            tail_logprob=nothing,
        ),
    )


KINDS: dict[str, list[Record]] = {
    "ragged": build_records(12),
    "even": build_records(12, ragged=False),
    "with an empty list": [*build_records(6)[:5], empty_support(build_records(6)[5])],
    "drawn": build_drawn_records(12, "head_tail"),
    "tempered": build_records(12, temperatures=(2.0, 4.0)),
    "of many pages": build_records(4, ragged=False, length=3000, vocab_size=300, top_k=200),
}


def write(
    folder: Path, records: list[Record], codec: Codec, vocab_size: int = 300
) -> tuple[bytes, pq.FileMetaData, ShardHeader]:
    """Bytes, metadata and header of a shard of one row group."""
    header = ShardHeader(
        format_version=FORMAT_VERSION,
        unit=0,
        plan_fingerprint="f" * 64,
        vocab_size=vocab_size,
        codec=codec,
        is_drawn=records[0].signal.support_draws is not None,
        temperatures=records[0].signal.temperatures,
    )
    write_shard(folder / "a.parquet", records, header, ShardSettings(codec=codec, row_group_bytes=1 << 30))
    data = (folder / "a.parquet").read_bytes()
    return data, *read_footer(data, "test")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.kind)
def test_values_without_lists_are_those_that_arrow_reads_with_them(tmp_path: Path, kind: str, codec: Codec) -> None:
    data, metadata, header = write(tmp_path, KINDS[kind], codec)
    columns = [name for name in list_columns(header) if name in SPLIT_COLUMNS]
    pages = _read_pages(metadata, 0, 0, data, columns)
    flat = {name: found.join() for name, found in pages.items()}
    # An empty list has a level and no value, so that one has to be read with its lists.
    lists_of_entries = {"support_ids", "support_steps", "support_logprobs"}
    assert set(flat) == set(columns) - (lists_of_entries if kind == "with an empty list" else set())
    table = pq.read_table(tmp_path / "a.parquet")
    for name in flat:
        expected = table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        assert (
            flat[name].dtype.kind == np.dtype(expected.dtype).kind or expected.dtype == np.uint16
        )  # which may come in int32
        np.testing.assert_array_equal(flat[name], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_thorough_and_usual_decoding_give_the_same_records(tmp_path: Path, kind: str) -> None:
    data, metadata, header = write(tmp_path, KINDS[kind], CompactCodec())
    usual, thorough = (
        decode_row_group(metadata, header, 0, 0, data, with_documents=True, where="", is_thorough=is_thorough)
        for is_thorough in (False, True)
    )
    for name, values in vars(thorough).items():
        np.testing.assert_array_equal(getattr(usual, name), values)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, pq.FileMetaData, ShardHeader]:
    return write(tmp_path_factory.mktemp("pages"), KINDS["even"], CompactCodec())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pages_with_damaged_bytes_are_refused_or_read_as_something_of_the_same_shape(
    shard: tuple[bytes, pq.FileMetaData, ShardHeader], data: st.DataObject
) -> None:
    content, metadata, header = shard
    columns = [metadata.row_group(0).column(i) for i in range(metadata.num_columns)]
    chunk = data.draw(st.sampled_from([c for c in columns if c.path_in_schema.split(".")[0] in SPLIT_COLUMNS]))
    places = st.integers(chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size - 1)
    damaged = bytearray(content)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)):
        damaged[place] = value
    try:
        batch = decode_row_group(metadata, header, 0, 0, bytes(damaged), with_documents=False, where="test")
    except CorruptShardError as error:
        assert "row group 0 cannot be decoded" in str(error)  # noqa: PT017  # which of the two is up to the byte
    else:
        assert len(batch.support_logprobs) == len(batch.support_ids) == batch.support_offsets[-1]


@pytest.mark.parametrize("kind", ["ragged", "with an empty list"])
@pytest.mark.parametrize(
    "options",
    [
        {"data_page_version": "1.0"},
        {"compression": "snappy"},
        {"use_dictionary": True, "use_byte_stream_split": False},
        {"use_byte_stream_split": False},
    ],
    ids=str,
)
def test_shard_that_other_software_wrote_again_is_left_to_arrow(
    tmp_path: Path, options: dict[str, object], kind: str
) -> None:
    data, metadata, header = write(tmp_path, KINDS[kind], Float32Codec())
    expected = decode_row_group(metadata, header, 0, 0, data, with_documents=True, where="")
    data, metadata, header = rewrite(tmp_path, **options)
    found = decode_row_group(metadata, header, 0, 0, data, with_documents=True, where="")
    assert _read_pages(metadata, 0, 0, data, list_columns(header)) == {}
    for name, values in vars(expected).items():
        np.testing.assert_array_equal(getattr(found, name), values)


def rewrite(folder: Path, **options: object) -> tuple[bytes, pq.FileMetaData, ShardHeader]:
    """The shard of a folder, written by Arrow with its own columns and other options."""
    table = pq.read_table(folder / "a.parquet")
    split = [f"{name}.list.element" for name in SPLIT_COLUMNS if name in table.column_names]
    usual = {"compression": "zstd", "data_page_version": "2.0", "use_dictionary": False, "use_byte_stream_split": split}
    pq.write_table(table, folder / "b.parquet", **{**usual, **options})
    data = (folder / "b.parquet").read_bytes()
    return data, *read_footer(data, "test")


def test_shard_that_is_written_again_as_it_was_is_read_without_lists(tmp_path: Path) -> None:
    write(tmp_path, KINDS["ragged"], CompactCodec())
    data, metadata, header = rewrite(tmp_path)
    assert len(_read_pages(metadata, 0, 0, data, list_columns(header))) == 6


def test_pages_of_version_1_whose_levels_are_as_long_as_missing_values_are_left_to_arrow(tmp_path: Path) -> None:
    # Three empty lists, and three values of 4 bytes fewer than levels; the levels take 12 bytes.
    list_type = pa.list_(pa.field("element", pa.int32(), nullable=False))
    lists = pa.array([[1], [2], [3], [], [], []], list_type)
    table = pa.table([lists], schema=pa.schema([pa.field("support_ids", list_type, nullable=False)]))
    path = tmp_path / "a.parquet"
    pq.write_table(
        table, path, compression="zstd", data_page_version="1.0", use_dictionary=False, use_byte_stream_split=True
    )
    chunk = pq.read_metadata(path).row_group(0).column(0)
    assert "BYTE_STREAM_SPLIT" in chunk.encodings
    assert read_pages({"support_ids": chunk}, 0, path.read_bytes()) == {}


class _PlainKeys(encryption.KmsClient):
    """Keys that lie in the file as they are."""

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> str:
        return base64.b64encode(key_bytes).decode()


def test_shard_with_an_encrypted_column_is_refused_before_pyarrow_ends_the_process(tmp_path: Path) -> None:
    write(tmp_path, KINDS["even"], CompactCodec())
    properties = encryption.CryptoFactory(lambda _: _PlainKeys()).file_encryption_properties(
        encryption.KmsConnectionConfig(),
        encryption.EncryptionConfiguration(
            footer_key="footer", column_keys={"column": ["support_ids.list.element"]}, plaintext_footer=True
        ),
    )
    with pytest.raises(CorruptShardError, match=r"expected .* bytes of Parquet metadata, .* columns are encrypted"):
        rewrite(tmp_path, encryption_properties=properties)


def split(values: np.ndarray) -> Pages:
    """A page of int32 or float32."""
    planes = _copy_used(values.view(np.uint8).reshape(-1, 4).T.copy())
    return Pages(dtype=values.dtype, starts=(0, len(values)), planes=(planes,))


@given(values=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40), cuts=st.sets(st.integers(0, 40), max_size=3))
def test_values_are_put_together_from_all_of_their_bytes(values: list[int], cuts: set[int]) -> None:
    expected = np.array(values, dtype=np.int32)
    starts = (0, *sorted(cut for cut in cuts if 0 < cut < len(values)), len(values))
    planes = tuple(split(expected[start:stop]).planes[0] for start, stop in pairwise(starts))
    pages = Pages(dtype=np.dtype("<i4"), starts=starts, planes=planes)
    np.testing.assert_array_equal(pages.join(), expected)
    assert pages.has_16_bits() == all(0 <= value < 2**16 for value in values)
    assert all(2 <= len(page) <= 4 for page in planes)
    floats = Pages(dtype=np.dtype("<f4"), starts=starts, planes=planes).join()
    np.testing.assert_array_equal(floats.view(np.int32), expected)


@pytest.mark.parametrize("value", [-1, 65_536])
def test_draws_that_are_no_16_bits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: int) -> None:
    data, metadata, header = write(tmp_path, KINDS["drawn"], CompactCodec())

    def read_damaged(*arguments: Any) -> dict[str, Pages]:
        pages = _read_pages(*arguments)
        draws = pages["support_draws"].join()
        draws[-1] = value
        return {**pages, "support_draws": split(draws)}

    monkeypatch.setattr("logitstore.shard.reader._read_pages", read_damaged)
    with pytest.raises(CorruptShardError, match="expected draws up to 65535, found"):
        decode_row_group(metadata, header, 0, 0, data, with_documents=True, where="")


@pytest.mark.parametrize(("step", "found"), [(65_536, 65_536), (-1, 2**32 - 1)])
@pytest.mark.parametrize("counts", [[2], [1, 1], [2, 0]])
def test_step_that_is_no_16_bits_is_refused(step: int, found: int, counts: list[int]) -> None:
    with pytest.raises(ValueError, match=f"expected steps up to 65535, found {found}"):
        compact.decode_steps(
            np.array([5, step], np.int32), np.array(counts, np.int32), np.zeros(len(counts), np.float32)
        )


@settings(max_examples=60, deadline=None)
@given(
    num_positions=st.integers(1, 40),
    top_k=st.integers(1, 130),
    largest=st.sampled_from([0, 3, 600, 5000, 65_535]),
    seed=st.integers(0, 1000),
)
def test_supports_of_one_length_decode_as_ragged_ones_do(
    num_positions: int, top_k: int, largest: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    steps = generator.integers(0, largest + 1, (num_positions, top_k)).astype(np.uint16)
    counts = np.full(num_positions, top_k, dtype=np.int32)
    tail = generator.choice([-np.inf, -20.0, -1.0, -1e-3, 0.0], num_positions).astype(np.float32)
    found = compact.decode_steps(steps.ravel(), counts, tail).reshape(num_positions, top_k)
    sums, most = compact._RowSums(*steps.shape).compute(steps)
    np.testing.assert_array_equal(sums, np.cumsum(steps, axis=1, dtype=np.int64))
    assert most == sums.max()
    ragged_counts = np.append(counts, np.int32(1))  # one more position makes them ragged where K is above 1
    ragged = compact.decode_steps(
        np.append(steps.ravel(), np.uint16(7)), ragged_counts, np.append(tail, np.float32(-1))
    )
    np.testing.assert_allclose(found.ravel(), ragged[:-1], rtol=1e-6, atol=1e-6)


def test_rows_are_decoded_in_parts_without_a_seam() -> None:
    rows = 2 * compiled.ENTRIES_AT_A_TIME // 64 + 3
    steps = np.random.default_rng(0).integers(0, 9, (rows, 64)).astype(np.uint16)
    tail = np.full(rows, -3.0, dtype=np.float32)
    found = compact.decode_steps(steps.ravel(), np.full(rows, 64, dtype=np.int32), tail).reshape(rows, 64)
    for row in (0, rows // 2, rows - 1):
        alone = compact.decode_steps(steps[row], np.array([64], dtype=np.int32), tail[:1])
        np.testing.assert_array_equal(found[row], alone)


def test_batches_of_records_without_any_support_are_read(tmp_path: Path) -> None:
    records = [empty_support(record) for record in KINDS["even"]]
    for index in range(len(records)):
        unknown = np.full(records[index].num_positions, np.nan, dtype=np.float32)
        signal = replace(records[index].signal, entropy=unknown, next_token_logprob=unknown)
        records[index] = replace(records[index], signal=signal)
    header = ShardHeader(
        format_version=FORMAT_VERSION,
        unit=0,
        plan_fingerprint="f" * 64,
        vocab_size=300,
        codec=CompactCodec(),
        unknown_scalars=("entropy", "next_token_logprob"),
    )
    write_shard(tmp_path / "a.parquet", records, header, ShardSettings())
    data = (tmp_path / "a.parquet").read_bytes()
    metadata, header = read_footer(data, "test")
    batch = decode_row_group(metadata, header, 0, 0, data, with_documents=True, where="")
    assert batch.num_positions == RecordBatch.from_records(records).num_positions
    assert len(batch.support_ids) == 0
