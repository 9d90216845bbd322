"""Supports that are decoded when they are wanted: the bits that decoding at once gives, or decoding at once."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_up import build_records
from made_up_draws import build_drawn_records

from logitstore.records import Record, RecordBatch
from logitstore.shard import compact, compiled
from logitstore.shard.codec import Codec, CompactCodec, Float16Codec, Float32Codec
from logitstore.shard.layout import ShardHeader
from logitstore.shard.packed import PackedRowGroup, PackedSupports, pack_supports
from logitstore.shard.pages import Pages, _copy_used
from logitstore.shard.reader import decode_row_group, pack_row_group
from tests.shard import test_pages


@pytest.fixture(autouse=True, params=["by NumPy", "by compiled loops"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What decodes: the compiled loops at once, or never."""
    is_compiled = request.param == "by compiled loops"
    if is_compiled:
        pytest.importorskip("numba")
    monkeypatch.setattr(compiled, "PATIENCE_ENTRIES", 0 if is_compiled else 1 << 60)


Shard = tuple[bytes, pq.FileMetaData, ShardHeader]


def write(folder: Path, records: list[Record], codec: Codec | None = None) -> Shard:
    return test_pages.write(folder, records, codec or CompactCodec(), vocab_size=70_000)


def decode(shard: Shard) -> RecordBatch:
    data, metadata, header = shard
    return decode_row_group(metadata, header, 0, 0, data, with_documents=True, where="test")


def pack(shard: Shard) -> RecordBatch | PackedRowGroup:
    data, metadata, header = shard
    return pack_row_group(metadata, header, 0, 0, data, with_documents=True, where="test")


def check_equal(found: RecordBatch, expected: RecordBatch) -> None:
    assert vars(found).keys() == vars(expected).keys()
    for name, values in vars(expected).items():
        np.testing.assert_array_equal(getattr(found, name), values, err_msg=name)
        assert not isinstance(values, np.ndarray) or getattr(found, name).dtype == values.dtype


@pytest.mark.parametrize(
    "options",
    [
        {"length": 30, "top_k": 8},
        {"length": 30, "top_k": 1},
        {"length": 9, "top_k": 128, "vocab_size": 70_000},
        {"length": 9, "top_k": 129, "vocab_size": 300},  # more than the loops take
        {"length": 30, "top_k": 8, "temperatures": (2.0, 4.0)},
        {"length": 3000, "top_k": 50, "vocab_size": 300},  # of several pages
    ],
    ids=str,
)
def test_packed_supports_unpack_to_the_bits_that_decoding_gives(tmp_path: Path, options: dict[str, object]) -> None:
    shard = write(tmp_path, build_records(4, ragged=False, **options))
    packed, expected = pack(shard), decode(shard)
    assert isinstance(packed, PackedRowGroup)
    assert len(packed) == len(expected) == 4
    check_equal(packed.unpack(), expected)
    assert (len(packed.supports._ids.planes) > 1) == (options["length"] == 3000)
    for start, stop in zip(expected.position_offsets[:-1], expected.position_offsets[1:], strict=True):
        entries = slice(*(np.array([start, stop]) * options["top_k"]))
        ids, logprobs = unpack(packed.supports, int(start), int(stop), expected.tail_logprob)
        np.testing.assert_array_equal(ids, expected.support_ids[entries])
        np.testing.assert_array_equal(logprobs, expected.support_logprobs[entries])


def test_pages_that_are_cut_anywhere_between_positions_unpack_to_the_same() -> None:
    generator = np.random.default_rng(0)
    num_positions, top_k = 40, 5
    values = generator.integers(0, 70_000, (2, num_positions * top_k)).astype(np.int32)
    values[1] %= 300
    values[1, 17] = 65_535  # far down
    tails = generator.normal(-3, 1, num_positions).astype(np.float32)
    ids, steps = (cut(column, places) for column, places in zip(values, ((35, 36, 111), (15, 100)), strict=True))
    supports = PackedSupports(ids, steps, top_k)
    expected = compact.decode_steps(values[1], np.full(num_positions, top_k, np.int32), tails)
    for start, stop in ((0, 40), (3, 4), (2, 21), (20, 40), (7, 7)):
        found = unpack(supports, start, stop, tails)
        np.testing.assert_array_equal(found[0], values[0, start * top_k : stop * top_k])
        np.testing.assert_array_equal(found[1], expected[start * top_k : stop * top_k])


def unpack(supports: PackedSupports, start: int, stop: int, tails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logprobs of positions [start, stop), of all of which the tails are given."""
    entries = slice(start * supports.num_entries, stop * supports.num_entries)
    ids, logprobs = (np.empty(entries.stop - entries.start, dtype=dtype) for dtype in (np.int32, np.float32))
    mass = np.empty(stop - start)
    supports.unpack(entries, ids, logprobs, mass)
    compact.rescale(mass, tails[start:stop], logprobs.reshape(-1, supports.num_entries))
    return ids, logprobs


def cut(values: np.ndarray, places: tuple[int, ...]) -> Pages:
    parts = np.split(values, places)
    planes = tuple(_copy_used(part.view(np.uint8).reshape(-1, 4).T.copy()) for part in parts)
    return Pages(dtype=values.dtype, starts=(0, *places, len(values)), planes=planes)


@pytest.mark.parametrize(
    ("places", "counts"),
    [
        pytest.param((12,), [5, 5, 5, 5], id="a position in two pages"),
        pytest.param((), [5, 5, 5, 4, 1], id="ragged"),
        pytest.param((), [4, 4, 4, 4], id="of other lengths"),
        pytest.param((), [], id="no positions"),
        pytest.param((), [0, 0], id="no entries"),
    ],
)
def test_steps_that_cannot_be_packed_are_not(places: tuple[int, ...], counts: list[int]) -> None:
    values = np.arange(20, dtype=np.int32)
    pack_steps = partial(pack_supports, are_steps=True)
    assert pack_steps(cut(values, (12,)), cut(values, (10,)), np.full(4, 5, np.int32)) is not None
    assert pack_steps(cut(values, ()), cut(values, places), np.array(counts, dtype=np.int32)) is None


def test_logprobs_that_are_not_as_many_as_the_counts_say_are_not_packed() -> None:
    values = np.arange(20, dtype=np.int32)
    pack_logprobs = partial(pack_supports, cut(values, (12,)), are_steps=False)
    assert pack_logprobs(cut(values, (7,)), np.array([9, 11], np.int32)) is not None
    assert pack_logprobs(cut(values, (7,)), np.array([9, 10], np.int32)) is None
    assert pack_logprobs(cut(values[:-1], ()), np.array([9, 11], np.int32)) is None


@pytest.mark.parametrize("step", [-1, 65_536])
def test_steps_that_are_no_16_bits_are_not_packed(step: int) -> None:
    values = np.array([1, 2, 3, step], dtype=np.int32)
    assert pack_supports(cut(values, ()), cut(values, ()), np.array([2, 2], np.int32), are_steps=True) is None


@pytest.mark.parametrize("codec", [Float32Codec(), Float16Codec()], ids=lambda codec: codec.kind)
@pytest.mark.parametrize("options", [{"ragged": True}, {"ragged": False, "length": 3000, "top_k": 100}], ids=str)
def test_packed_logprobs_unpack_to_the_bits_that_decoding_gives(
    tmp_path: Path, codec: Codec, options: dict[str, Any]
) -> None:
    shard = write(tmp_path, build_records(4, vocab_size=300, **options), codec)
    packed, expected = pack(shard), decode(shard)
    assert isinstance(packed, PackedRowGroup)
    check_equal(packed.unpack(), expected)
    for start, stop in pairwise(expected.support_offsets.tolist()):
        ids, logprobs = (np.empty(stop - start, dtype=dtype) for dtype in (np.int32, np.float32))
        packed.supports.unpack(slice(start, stop), ids, logprobs, np.empty(0))
        np.testing.assert_array_equal(ids, expected.support_ids[start:stop])
        np.testing.assert_array_equal(logprobs, expected.support_logprobs[start:stop])


@pytest.mark.parametrize("kind", ["ragged", "drawn", "drawn, of float32"])
def test_other_supports_are_decoded_at_once(tmp_path: Path, kind: str) -> None:
    records = build_records(5) if kind == "ragged" else build_drawn_records(5, "head_tail")
    shard = write(tmp_path, records, Float32Codec() if "float32" in kind else None)
    found = pack(shard)
    assert isinstance(found, RecordBatch)
    check_equal(found, decode(shard))
