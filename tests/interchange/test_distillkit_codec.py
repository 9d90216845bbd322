"""DistillKit's compression: held to bytes and values that its own encoder and decoder made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitstore.errors import ConfigError, ShapeError
from logitstore.interchange.bit_packing import count_packed_bytes, pack_bits, unpack_bits
from logitstore.interchange.distillkit_codec import (
    CompressionConfig,
    compress_logprobs,
    decompress_logprobs,
    pack_ids,
    unpack_ids,
)
from logitstore.interchange.float_bytes import FloatName, from_bytes, round_to, to_bytes
from logitstore.settings import build_settings

GOLDEN = json.loads((Path(__file__).parent / "distillkit_golden.json").read_text(encoding="utf-8"))
LOGPROBS = np.array(GOLDEN["logprobs"], dtype=np.float32)
IDS = np.array(GOLDEN["ids"])


def build_config(**changes: Any) -> CompressionConfig:
    values = {**GOLDEN["cases"]["recommended"]["config"], **changes}
    return build_settings(CompressionConfig, values, where="test")


def read_hex(rows: list[str]) -> np.ndarray:
    return np.array([list(bytes.fromhex(row)) for row in rows], dtype=np.uint8)


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_decoder_of_distillkits_bytes_reads_what_distillkit_reads(name: str) -> None:
    case = GOLDEN["cases"][name]
    config = build_settings(CompressionConfig, case["config"], where=name)
    found = decompress_logprobs(read_hex(case["compressed_logprobs"]), config)
    np.testing.assert_allclose(found, np.array(case["decoded"]), rtol=0, atol=1e-5)
    assert unpack_ids(read_hex(case["bytepacked_indices"]), config).tolist() == GOLDEN["ids"]


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_encoder_writes_as_many_bytes_as_distillkit_and_is_no_further_off(name: str) -> None:
    case = GOLDEN["cases"][name]
    config = build_settings(CompressionConfig, case["config"], where=name)
    theirs, ours = read_hex(case["compressed_logprobs"]), compress_logprobs(LOGPROBS, config)
    assert ours.shape == theirs.shape == (3, config.logprob_bytes)
    error = np.abs(decompress_logprobs(ours, config) - LOGPROBS).max(axis=1)
    assert (error <= np.abs(np.array(case["decoded"]) - LOGPROBS).max(axis=1) * 1.05 + 1e-5).all()
    assert pack_ids(IDS, config).tolist() == read_hex(case["bytepacked_indices"]).tolist()


@pytest.mark.parametrize("name", ["exact", "diffusion"])
def test_encoder_without_a_polynomial_writes_distillkits_bytes(name: str) -> None:
    case = GOLDEN["cases"][name]
    config = build_settings(CompressionConfig, case["config"], where=name)
    assert compress_logprobs(LOGPROBS, config).tolist() == read_hex(case["compressed_logprobs"]).tolist()


def test_encoder_with_the_recommended_terms_fits_in_float64() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, (50, 2000))
    logprobs = -np.sort(-(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)), axis=1)[:, :128]
    terms = (0, 1, 2, 3, 4, "sqrt")
    config = build_config(k=128, exact_k=16, polynomial_terms=terms)
    found = decompress_logprobs(compress_logprobs(logprobs.astype(np.float32), config), config)[:, 16:]
    points = np.arange(112.0) / 111
    matrix = np.stack([np.sqrt(points) if term == "sqrt" else points**term for term in terms], axis=1)
    best = matrix @ np.linalg.lstsq(matrix, logprobs[:, 16:].T, rcond=None)[0]
    np.testing.assert_allclose(found, best.T, rtol=0, atol=1e-4)


@given(
    st.integers(1, 64).flatmap(
        lambda bits: st.tuples(
            st.just(bits), st.lists(st.integers(0, min(2**bits, 2**63) - 1), min_size=1, max_size=20)
        )
    )
)
def test_packed_bits_of_any_width_come_back_and_are_big_endian(case: tuple[int, list[int]]) -> None:
    bits, values = case
    packed = pack_bits(np.array([values], dtype=np.int64), bits)
    width = count_packed_bytes(len(values), bits)
    stream = "".join(f"{value:0{bits}b}" for value in values).ljust(8 * width, "0")
    assert bytes(packed[0]) == int(stream, 2).to_bytes(width, "big")
    assert unpack_bits(packed, bits, len(values)).tolist() == [values]


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_float_bytes_hold_what_rounding_gives(name: FloatName) -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(0, 10, (4, 9)).astype(np.float32)
    expected = torch.tensor(values).to(getattr(torch, name))
    assert to_bytes(values, name).tolist() == expected.view(torch.uint8).tolist()
    assert from_bytes(to_bytes(values, name), name).tolist() == expected.double().tolist()
    assert round_to(values, name).tolist() == expected.double().tolist()


@pytest.mark.parametrize(
    ("vocab_size", "bits"), [(32_000, 15), (65_536, 16), (65_537, 17), (131_072, 17), (131_073, 18), (1_000_003, 20)]
)
def test_id_bits_of_a_vocabulary_hold_its_largest_id(vocab_size: int, bits: int) -> None:
    config = build_config(d=vocab_size)
    assert config.id_bits == bits
    ids = np.full((1, config.k), vocab_size - 1)
    assert unpack_ids(pack_ids(ids, config), config).tolist() == ids.tolist()


def test_pack_ids_beyond_the_bits_of_d_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected ids below 2\^6 for d = 50, found 64; set d"):
        pack_ids(np.full((1, 24), 64), build_config(d=50))


def test_decoder_with_another_config_says_which_bytes_it_expected() -> None:
    data = read_hex(GOLDEN["cases"]["exact"]["compressed_logprobs"])
    with pytest.raises(ShapeError, match=r"compressed_logprobs: expected 24 bytes at every position, .* found 48"):
        decompress_logprobs(data, build_config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exact_k": 25}, "exact_k: expected at most k = 24, found 25"),
        ({"polynomial_terms": None}, "expected polynomial_terms or residual_bins"),
        ({"polynomial_terms": [-1]}, "is not finite for every slot"),
        ({"unheard": 1}, "unheard"),
    ],
)
def test_config_that_cannot_be_used_says_why(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(**changes)
