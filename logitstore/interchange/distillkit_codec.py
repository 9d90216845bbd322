"""DistillKit's compressed logprobs: some stored as they are, the rest as a polynomial in the slot plus residuals.

The bytes of a position are, in this order: `exact_k` values in `exact_dtype`; one coefficient in `term_dtype` for every
polynomial term; for every residual bin its scale in `scale_dtype` and its elements, bit-packed. With delta encoding
all of that is about the differences between slots. Decoding follows DistillKit's arithmetic, precision by precision, so
that a reader here sees what a student there is taught.

Two things of it are worth knowing. Its polynomial runs over t = 0 … k − exact_k − 1 unless `normalize_t` is set; t to
the fourth is then 10^8 beside 1, and DistillKit's own least squares, in float32, loses the small coefficients. With its
recommended config (k 128, exact_k 16, powers 0 to 4 and the root) over made-up logits of 5,000 ids, its logprobs are
off by up to 3 nats, mean KL 0.022. Coefficients are fitted in float64 here: as many bytes, and off by up to 0.22 nats,
mean KL 0.00024, which is the polynomial's own error. And a sum in `term_dtype` depends on its order: decoded values
agree with DistillKit's within 10^-5 nats where that is float32, and within a unit in its last place where it is less.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from logitstore.errors import ConfigError, ShapeError
from logitstore.interchange.bit_packing import count_packed_bytes, pack_bits, unpack_bits
from logitstore.interchange.float_bytes import ITEM_BYTES, FloatName, from_bytes, promote, round_to, to_bytes
from logitstore.settings import Settings


class ResidualBin(Settings):
    """Residuals of consecutive slots, quantized with one scale."""

    scale_dtype: FloatName
    element_bits: int = Field(gt=0, le=64)
    num_elements: int = Field(gt=0)


class CompressionConfig(Settings):
    """How a DistillKit data set is compressed: the keys of its `compression_config.yaml`.

    Attributes:
        d: ids of the vocabulary; decides the bits of an id.
        k: entries of a position.
        exact_k: how many of them, the likeliest, are stored as numbers.
        exact_dtype: their precision.
        polynomial_terms: powers of t, "sqrt" and "exp", whose sum stands for the others.
        term_dtype: precision of the coefficients and of the sum.
        residual_bins: what the polynomial leaves of the first of these others, quantized.
        delta_encoding: whether all this is about differences between neighbours.
        error_diffusion: whether a rounding error is passed on to the next slot.
        normalize_t: whether t runs over [0, 1].
    """

    d: int = Field(gt=0)
    k: int = Field(gt=0)
    exact_k: int = Field(ge=0)
    exact_dtype: FloatName = "float32"
    polynomial_terms: tuple[Literal["sqrt", "exp"] | int, ...] | None = None
    term_dtype: FloatName = "float32"
    residual_bins: tuple[ResidualBin, ...] = ()
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @model_validator(mode="after")
    def _check_slots(self) -> CompressionConfig:
        if self.exact_k > self.k:
            raise ValueError(f"exact_k: expected at most k = {self.k}, found {self.exact_k}")
        if self.exact_k < self.k and not self.polynomial_terms and not self.residual_bins:
            raise ValueError("expected polynomial_terms or residual_bins for the slots beyond exact_k, found neither")
        in_bins = sum(residual_bin.num_elements for residual_bin in self.residual_bins)
        if in_bins > self.num_approximated:
            raise ValueError(
                f"residual_bins: expected at most k - exact_k = {self.num_approximated} elements, found {in_bins}"
            )
        if self.num_approximated and not np.isfinite(self.build_terms()).all():
            raise ValueError(f"polynomial_terms: a term of {self.polynomial_terms} is not finite for every slot")
        return self

    @property
    def num_approximated(self) -> int:
        return self.k - self.exact_k

    @property
    def is_exact(self) -> bool:
        """Whether every entry is stored as a number of its own, without sums."""
        return not self.num_approximated and not self.delta_encoding

    @property
    def id_bits(self) -> int:
        """Bits of a packed id: the logarithm rounded up, in float32 as DistillKit computes it."""
        return int(np.ceil(np.log2(np.float32(self.d))))

    @property
    def logprob_bytes(self) -> int:
        """Bytes of a position in `compressed_logprobs`."""
        size = (
            self.exact_k * ITEM_BYTES[self.exact_dtype] + len(self.polynomial_terms or ()) * ITEM_BYTES[self.term_dtype]
        )
        for part in self.residual_bins:
            size += ITEM_BYTES[part.scale_dtype] + count_packed_bytes(part.num_elements, part.element_bits)
        return size

    @property
    def id_bytes(self) -> int:
        """Bytes of a position in `bytepacked_indices`."""
        return count_packed_bytes(self.k, self.id_bits)

    def build_terms(self) -> np.ndarray:
        """[k - exact_k, terms] the polynomial's terms at every slot, rounded to `term_dtype`."""
        points = round_to(_build_points(self.num_approximated, is_normalized=self.normalize_t), self.term_dtype)
        columns = []
        with np.errstate(over="ignore", divide="ignore"):
            for term in self.polynomial_terms or ():
                column = {"sqrt": np.sqrt, "exp": np.exp}[term](points) if isinstance(term, str) else points**term
                columns.append(round_to(column, self.term_dtype))
        return np.stack(columns, axis=-1) if columns else np.zeros((self.num_approximated, 0))


def pack_ids(ids: np.ndarray, config: CompressionConfig) -> np.ndarray:
    """[P, k] token ids as the bytes of `bytepacked_indices`.

    Raises:
        ConfigError: an id does not fit the bits that `d` asks for.
    """
    if ids.size and int(ids.max()) >> config.id_bits:
        raise ConfigError(
            f"compression config: expected ids below 2^{config.id_bits} for d = {config.d}, found {int(ids.max())}; "
            "set d to the vocabulary's size"
        )
    return pack_bits(ids, config.id_bits)


def unpack_ids(data: np.ndarray, config: CompressionConfig) -> np.ndarray:
    """[P, k] int64 token ids from the bytes of `bytepacked_indices`."""
    _check_width(data, config.id_bytes, "bytepacked_indices")
    return unpack_bits(data, config.id_bits, config.k)


def compress_logprobs(logprobs: np.ndarray, config: CompressionConfig) -> np.ndarray:
    """The bytes of `compressed_logprobs` for [P, k] float32 logprobs, likeliest first, finite."""
    values = _take_differences(logprobs, config) if config.delta_encoding else logprobs
    chunks = [to_bytes(values[:, : config.exact_k], config.exact_dtype)]
    residual = values[:, config.exact_k :].astype(np.float64)
    if config.polynomial_terms:
        coefficients = _fit(residual, config)
        chunks.append(to_bytes(coefficients, config.term_dtype))
        residual = residual - _evaluate(round_to(coefficients, config.term_dtype), config)
    carried = np.zeros(len(logprobs))
    start = 0
    for part in config.residual_bins:
        scale, levels, carried = _quantize(residual[:, start : start + part.num_elements], part, carried, config)
        chunks += [to_bytes(scale, part.scale_dtype), pack_bits(levels, part.element_bits)]
        start += part.num_elements
    return np.concatenate(chunks, axis=1)


def decompress_logprobs(data: np.ndarray, config: CompressionConfig) -> np.ndarray:
    """[P, k] float32 logprobs from the bytes of `compressed_logprobs`.

    Raises:
        ShapeError: a position has another number of bytes than the config asks for.
    """
    _check_width(data, config.logprob_bytes, "compressed_logprobs")
    sizes = [config.exact_k * ITEM_BYTES[config.exact_dtype]]
    sizes.append(len(config.polynomial_terms or ()) * ITEM_BYTES[config.term_dtype])
    exact, coefficients, packed = np.split(data, np.cumsum(sizes), axis=1)
    approximated, precision = _read_residuals(packed, config)
    if config.polynomial_terms:
        fitted = _evaluate(from_bytes(coefficients, config.term_dtype), config)
        precision = promote(config.term_dtype, precision)
        approximated = round_to(fitted + approximated, precision)
    values = np.concatenate([from_bytes(exact, config.exact_dtype), approximated], axis=1)
    if config.delta_encoding:
        values = round_to(np.cumsum(values.astype(np.float32), axis=1, dtype=np.float32), config.exact_dtype)
    return values.astype(np.float32)


def _build_points(count: int, *, is_normalized: bool) -> np.ndarray:
    points = np.arange(count, dtype=np.float32)
    if not is_normalized or count < 2:
        return points
    step = np.float32(1) / np.float32(count - 1)  # torch.linspace counts from the nearer end
    return np.where(points < count // 2, step * points, np.float32(1) - step * points[::-1]).astype(np.float32)


def _take_differences(logprobs: np.ndarray, config: CompressionConfig) -> np.ndarray:
    if not config.error_diffusion:
        differences: np.ndarray = np.diff(logprobs, axis=1, prepend=np.float32(0))
        return differences
    exact = np.diff(logprobs.astype(np.float64), axis=1, prepend=0.0)
    rounded = np.empty_like(logprobs)
    carried = np.zeros(len(logprobs))
    for slot in range(logprobs.shape[1]):
        wanted = exact[:, slot] + carried
        rounded[:, slot] = wanted
        carried = wanted - rounded[:, slot]
    return rounded


def _fit(values: np.ndarray, config: CompressionConfig) -> np.ndarray:
    """[P, terms] float64 least-squares coefficients; columns are scaled, so that no power drowns another."""
    terms = config.build_terms().astype(np.float64)
    scales = np.maximum(np.abs(terms).max(axis=0), 1e-300)
    solved = np.linalg.lstsq(terms / scales, values.T, rcond=None)[0]
    coefficients: np.ndarray = solved.T / scales
    return coefficients


def _evaluate(coefficients: np.ndarray, config: CompressionConfig) -> np.ndarray:
    """[P, k - exact_k] the polynomial at every slot, products and sum rounded to `term_dtype`."""
    terms = config.build_terms()
    total = np.zeros((len(coefficients), config.num_approximated), dtype=coefficients.dtype)
    for column in range(coefficients.shape[1]):
        total += round_to(terms[:, column] * coefficients[:, column : column + 1], config.term_dtype)
    return round_to(total, config.term_dtype)


def _quantize(
    values: np.ndarray, part: ResidualBin, carried: np.ndarray, config: CompressionConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale [P, 1], levels [P, N] counted from 0, and what is carried to the next bin (in units of the scale)."""
    lowest, highest = _level_range(part.element_bits)
    largest = np.abs(values).max(axis=1, keepdims=True)
    scale = round_to(np.where(largest == 0, 1.0, largest / max(1, -lowest)), part.scale_dtype)
    scaled = values / np.where(scale == 0, 1.0, scale)
    levels = np.empty(values.shape, dtype=np.int64)
    for slot in range(values.shape[1]):
        wanted = scaled[:, slot] + (carried if config.error_diffusion else 0.0)
        level = np.clip(np.round(wanted), lowest, highest)
        carried = wanted - level
        levels[:, slot] = level.astype(np.int64) - lowest
    return scale, levels, carried


def _level_range(element_bits: int) -> tuple[int, int]:
    return (0, 1) if element_bits == 1 else (-(1 << (element_bits - 1)), (1 << (element_bits - 1)) - 1)


def _read_residuals(packed: np.ndarray, config: CompressionConfig) -> tuple[np.ndarray, FloatName]:
    """[P, k - exact_k] residuals, zero where no bin holds them, and the precision they were rounded to."""
    residuals = np.zeros((len(packed), config.num_approximated), dtype=np.float32)
    start = offset = 0
    for part in config.residual_bins:
        scale_stop = offset + ITEM_BYTES[part.scale_dtype]
        stop = scale_stop + count_packed_bytes(part.num_elements, part.element_bits)
        scale = from_bytes(packed[:, offset:scale_stop], part.scale_dtype)
        levels = unpack_bits(packed[:, scale_stop:stop], part.element_bits, part.num_elements)
        signed = 2 * levels - 1 if part.element_bits == 1 else levels + _level_range(part.element_bits)[0]
        residuals[:, start : start + part.num_elements] = signed.astype(np.float32) * scale
        start += part.num_elements
        offset = stop
    return round_to(residuals, config.exact_dtype), config.exact_dtype


def _check_width(data: np.ndarray, expected: int, column: str) -> None:
    if data.shape[1] != expected:
        raise ShapeError(
            f"{column}: expected {expected} bytes at every position, as the compression config says, found "
            f"{data.shape[1]}; give the config that the data set was made with"
        )
