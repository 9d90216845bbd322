"""What the layouts of other projects take for the same signals."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitstore.interchange.distillkit import CompressedDistillKitLayout
from logitstore.interchange.distillkit_codec import CompressionConfig, decompress_logprobs
from logitstore.records import Record, RecordBatch

# DistillKit's own example for k = 128: 16 exact entries, a polynomial for the others.
_RECOMMENDED_K, _RECOMMENDED_EXACT_K = 128, 16
_RECOMMENDED_TERMS = (0, 1, 2, 3, 4, "sqrt")


@dataclass(frozen=True, kw_only=True)
class PeerFigures:
    """One layout.

    Attributes:
        bytes_per_position: of the whole file.
        packed_bytes: of a position's ids and values as the layout packs them, before the file's own compression.
        mean_kl, high_kl: nats, within the support; the mean, and what one position in a thousand exceeds.
    """

    name: str
    bytes_per_position: float
    packed_bytes: int | None = None
    mean_kl: float | None = None
    high_kl: float | None = None


def measure_peers(records: list[Record], vocab_size: int, top_k: int) -> list[PeerFigures]:
    """Bytes per position of whole files, token ids included, as those projects' writers make them.

    Divergences are within the support, which both sides are normalized to: these layouts keep no tail.
    """
    batch = RecordBatch.from_records(records)
    exact = CompressionConfig(d=vocab_size, k=top_k, exact_k=top_k, exact_dtype="bfloat16", delta_encoding=False)
    peers = [_measure_distillkit("DistillKit exact (bfloat16)", batch, exact)]
    if top_k == _RECOMMENDED_K:
        config = CompressionConfig(
            d=vocab_size,
            k=top_k,
            exact_k=_RECOMMENDED_EXACT_K,
            exact_dtype="bfloat16",
            polynomial_terms=_RECOMMENDED_TERMS,
            delta_encoding=False,
        )
        peers.append(_measure_distillkit("DistillKit recommended", batch, config))
    return [*peers, _measure_plain(batch)]


def _measure_distillkit(name: str, batch: RecordBatch, config: CompressionConfig) -> PeerFigures:
    table = CompressedDistillKitLayout(config=config).build_table(batch)
    packed = table["compressed_logprobs"].combine_chunks().flatten().flatten().to_numpy()
    logprobs = batch.support_logprobs.reshape(-1, config.k).astype(np.float64)
    decoded = decompress_logprobs(packed.reshape(len(logprobs), -1), config).astype(np.float64)
    kl = _compute_kl_within(logprobs, decoded)
    return PeerFigures(
        name=name,
        bytes_per_position=_write(table, compression="snappy") / batch.num_positions,
        packed_bytes=config.id_bytes + config.logprob_bytes,
        mean_kl=float(kl.mean()),
        high_kl=float(np.percentile(kl, 99.9)),
    )


def _compute_kl_within(logprobs: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    expected = logprobs - np.logaddexp.reduce(logprobs, axis=1, keepdims=True)
    found = decoded - np.logaddexp.reduce(decoded, axis=1, keepdims=True)
    kl: np.ndarray = (np.exp(expected) * (expected - found)).sum(axis=1)
    return kl


def _measure_plain(batch: RecordBatch) -> PeerFigures:
    """What one writes without thinking about it: int64 ids and float32 logprobs, zstd."""
    tokens = batch.position_offsets + np.arange(len(batch) + 1)
    table = pa.table(
        {
            "input_ids": pa.ListArray.from_arrays(tokens.astype(np.int32), batch.token_ids.astype(np.int64)),
            "top_ids": pa.ListArray.from_arrays(
                batch.support_offsets.astype(np.int32), batch.support_ids.astype(np.int64)
            ),
            "top_logprobs": pa.ListArray.from_arrays(batch.support_offsets.astype(np.int32), batch.support_logprobs),
        }
    )
    size = _write(table, compression="zstd") / batch.num_positions
    return PeerFigures(name="plain Parquet (int64, float32, zstd)", bytes_per_position=size)


def _write(table: pa.Table, *, compression: str) -> int:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression=compression)
    return len(sink.getvalue())
