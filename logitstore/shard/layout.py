"""The columns of a shard, and the conversion between them and record batches. FORMAT.md is the specification."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

import numpy as np
import pyarrow as pa

from logitstore.errors import CorruptShardError, IncompatibleStoreError
from logitstore.records import DocumentSpan, RecordBatch
from logitstore.settings import Settings
from logitstore.shard.codec import Codec, decode_supports
from logitstore.shard.compact import check_16_bits
from logitstore.shard.record_statistics import compute_mean

FORMAT_VERSION = 1
METADATA_KEY = b"logitstore"
_PLAIN_COLUMNS = (
    "token_ids",
    "loss_mask",
    "support_counts",
    "support_ids",
    "tail_logprob",
    "entropy",
    "next_token_logprob",
)


def _list_of(value_type: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", value_type, nullable=False))


# The columns of every codec and method; a shard has `support_logprobs` or `support_steps`, as its codec says, and
# `document_labels`, `support_draws` and `tempered_logsumexp` where its header says that. Manifests list columns by
# their places here. What records are chosen by comes first: in each row group it is one short range of bytes.
SCHEMA = pa.schema(
    [
        pa.field("unit", pa.int32(), nullable=False),
        pa.field("record", pa.int32(), nullable=False),
        pa.field("mean_entropy", pa.float32(), nullable=False),
        pa.field("mean_next_token_logprob", pa.float32(), nullable=False),
        pa.field("document_labels", _list_of(pa.string()), nullable=False),
        pa.field("token_ids", _list_of(pa.int32()), nullable=False),
        pa.field("loss_mask", _list_of(pa.bool_()), nullable=False),
        pa.field("document_ids", _list_of(pa.string()), nullable=False),
        pa.field("document_starts", _list_of(pa.int32()), nullable=False),
        pa.field("document_offsets", _list_of(pa.int64()), nullable=False),
        pa.field("support_counts", _list_of(pa.int32()), nullable=False),
        pa.field("support_ids", _list_of(pa.int32()), nullable=False),
        pa.field("support_logprobs", _list_of(pa.float32()), nullable=False),
        pa.field("support_steps", _list_of(pa.uint16()), nullable=False),
        pa.field("tail_logprob", _list_of(pa.float32()), nullable=False),
        pa.field("entropy", _list_of(pa.float32()), nullable=False),
        pa.field("next_token_logprob", _list_of(pa.float32()), nullable=False),
        pa.field("support_draws", _list_of(pa.uint16()), nullable=False),
        pa.field("tempered_logsumexp", _list_of(pa.float32()), nullable=False),
    ]
)
LABELS_COLUMN = "document_labels"
DOCUMENT_COLUMNS = ("document_ids", LABELS_COLUMN, "document_starts", "document_offsets")
MEAN_COLUMNS = ("mean_entropy", "mean_next_token_logprob")
DRAWS_COLUMN = "support_draws"
TEMPERED_COLUMN = "tempered_logsumexp"
# The last of them: shards and manifests without them are what they would be if there were none.
OPTIONAL_COLUMNS = (DRAWS_COLUMN, TEMPERED_COLUMN)
_VALUE_COLUMNS = ("support_logprobs", "support_steps")
# Numbers whose bytes look alike plane by plane and not value by value; measured in BENCHMARKS.md.
SPLIT_COLUMNS = (
    *MEAN_COLUMNS,
    "token_ids",
    "support_ids",
    *_VALUE_COLUMNS,
    "tail_logprob",
    "entropy",
    "next_token_logprob",
    DRAWS_COLUMN,
    TEMPERED_COLUMN,
)
UnknownScalar = Literal["entropy", "next_token_logprob"]


class ShardHeader(Settings):
    """What a shard says of itself in the file's key-value metadata, under the key `logitstore`."""

    format_version: int
    unit: int
    plan_fingerprint: str
    vocab_size: int
    codec: Codec
    unknown_scalars: tuple[UnknownScalar, ...] = ()
    """Columns in which NaN stands for a value that the source of the signals did not tell."""
    is_drawn: bool = False
    """Whether supports were drawn and there is the column `support_draws`; left out of the file where not."""
    temperatures: tuple[float, ...] = ()
    """Those that the column `tempered_logsumexp` is of; left out of the file where there are none."""
    has_labels: bool = False
    """Whether documents have labels and there is the column `document_labels`; left out of the file where not."""


def build_schema(header: ShardHeader) -> pa.Schema:
    """The schema of a shard, with the header as metadata."""
    schema = pa.schema([SCHEMA.field(name) for name in list_columns(header, with_means=True)])
    values = header.model_dump_json(
        exclude={name for name in ("is_drawn", "temperatures", "has_labels") if not getattr(header, name)}
    )
    return schema.with_metadata({METADATA_KEY: values.encode()})


def list_columns(header: ShardHeader, *, with_documents: bool = True, with_means: bool = False) -> list[str]:
    """Names of the columns of a shard, in order; records are read without the means."""
    without = {name for name in _VALUE_COLUMNS if name != header.codec.value_column}
    without |= set() if with_documents else set(DOCUMENT_COLUMNS)
    without |= set() if with_means else set(MEAN_COLUMNS)
    without |= set() if header.has_labels else {LABELS_COLUMN}
    without |= set() if header.is_drawn else {DRAWS_COLUMN}
    without |= set() if header.temperatures else {TEMPERED_COLUMN}
    return [name for name in SCHEMA.names if name not in without]


def read_header(metadata: dict[bytes, bytes] | None, where: str) -> ShardHeader:
    """Header of a shard from its key-value metadata.

    Raises:
        IncompatibleStoreError: this is no shard, or one of another format version.
        CorruptShardError: the header cannot be read.
    """
    raw = (metadata or {}).get(METADATA_KEY)
    if raw is None:
        raise IncompatibleStoreError(f"{where}: expected a logitstore shard, found a Parquet file without its header")
    try:
        values = json.loads(raw)
        version = values.get("format_version") if isinstance(values, dict) else None
        if version == FORMAT_VERSION:
            return ShardHeader.model_validate(values)
    except ValueError as error:
        raise CorruptShardError(
            f"{where}: expected the header of a shard, found {error}; run 'logitstore verify'"
        ) from error
    raise IncompatibleStoreError(
        f"{where}: format version differs\n  in the shard: {version}\n"
        f"  this program reads: {FORMAT_VERSION}\ninstall a logitstore that reads that version"
    )


def build_table(batch: RecordBatch, values: np.ndarray, schema: pa.Schema) -> pa.Table:
    """Columns of a shard from the two things that `encode_batch` makes of a batch."""
    positions, entries = batch.position_offsets, batch.support_offsets
    tokens = positions + np.arange(len(positions))
    documents = batch.documents if batch.documents is not None else ((),) * len(batch)
    spans = [span for record in documents for span in record]
    segments = np.concatenate([[0], np.cumsum([len(record) for record in documents])])
    columns: dict[str, pa.Array] = {
        "unit": pa.array(batch.units, pa.int32()),
        "record": pa.array(batch.indices, pa.int32()),
        "token_ids": _build_list(tokens, batch.token_ids, schema, "token_ids"),
        "mean_entropy": pa.array(compute_mean(batch, "entropy")),
        "mean_next_token_logprob": pa.array(compute_mean(batch, "next_token_logprob")),
        "document_ids": _build_list(segments, [span.document_id for span in spans], schema, "document_ids"),
        "document_starts": _build_list(segments, [span.start for span in spans], schema, "document_starts"),
        "document_offsets": _build_list(segments, [span.document_offset for span in spans], schema, "document_offsets"),
    }
    if LABELS_COLUMN in schema.names:
        columns[LABELS_COLUMN] = _build_list(segments, [span.label or "" for span in spans], schema, LABELS_COLUMN)
    columns["support_ids"] = _build_list(entries, batch.support_ids, schema, "support_ids")
    for name in set(_VALUE_COLUMNS) & set(schema.names):
        columns[name] = _build_list(entries, values, schema, name)
    if DRAWS_COLUMN in schema.names:
        columns[DRAWS_COLUMN] = _build_list(entries, batch.support_draws, schema, DRAWS_COLUMN)
    if TEMPERED_COLUMN in schema.names:
        assert batch.tempered_logsumexp is not None
        values_of_record = positions * len(batch.temperatures)
        flat = batch.tempered_logsumexp.ravel()
        columns[TEMPERED_COLUMN] = _build_list(values_of_record, flat, schema, TEMPERED_COLUMN)
    for name in ("loss_mask", "support_counts", "tail_logprob", "entropy", "next_token_logprob"):
        columns[name] = _build_list(positions, getattr(batch, name), schema, name)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _build_list(offsets: np.ndarray, values: object, schema: pa.Schema, name: str) -> pa.Array:
    list_type = schema.field(name).type
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(values, list_type.value_type), type=list_type
    )


def build_batch(
    table: pa.Table,
    codec: Codec,
    temperatures: tuple[float, ...] = (),
    flat: Mapping[str, np.ndarray] = MappingProxyType({}),
    *,
    with_supports: bool = True,
) -> RecordBatch:
    """Record batch from the columns of a shard, its values decoded; those of documents and draws may be absent.

    Args:
        table: the columns.
        codec, temperatures: as the shard's header has them.
        flat: values of further columns, the lists of each joined; those of 16 bits may come in 32.
        with_supports: or else the batch has the counts and offsets of supports and none of their entries; the columns
            of these need not be there.

    Raises:
        ValueError, LookupError: the columns do not fit together.
    """
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    values = {
        name: column.flatten().to_numpy(zero_copy_only=False)
        for name, column in columns.items()
        if pa.types.is_list(column.type) and name != "document_ids"
    } | dict(flat)
    if not with_supports:
        values["support_ids"] = np.empty(0, dtype=np.int32)
    signal = {name: values[name] for name in _PLAIN_COLUMNS}
    position_offsets = _read_offsets(columns["loss_mask"])
    support_offsets = _sum_counts(signal["support_counts"], position_offsets)
    draws, tempered = values.get(DRAWS_COLUMN), values.get(TEMPERED_COLUMN)
    if draws is not None:
        check_16_bits(draws, "draws")
        draws = draws.astype(np.uint16, copy=False)
    for name in values.keys() & {*SPLIT_COLUMNS, "support_counts"} - (set() if with_supports else {"support_ids"}):
        expected = _find_offsets(name, position_offsets, support_offsets, len(temperatures))
        found = _read_offsets(columns[name]) if name in columns else np.array([0, len(values[name])])
        if not np.array_equal(found, expected if name in columns else expected[[0, -1]]):
            of_grid = f" {len(temperatures)} values for each position" if name == TEMPERED_COLUMN else " its length"
            raise ValueError(f"{name} has not{of_grid}: expected {expected[-1]} in all, found {found[-1]}")
    return RecordBatch(
        units=columns["unit"].to_numpy(),
        indices=columns["record"].to_numpy(),
        position_offsets=position_offsets,
        support_offsets=support_offsets,
        documents=_read_documents(columns, values) if "document_ids" in columns else None,
        support_logprobs=decode_supports(
            codec, values[codec.value_column], draws, signal["support_counts"], signal["tail_logprob"]
        )
        if with_supports
        else np.empty(0, dtype=np.float32),
        support_draws=draws,
        temperatures=temperatures,
        tempered_logsumexp=None if tempered is None else tempered.reshape(-1, len(temperatures)),
        **signal,
    )


def _sum_counts(counts: np.ndarray, position_offsets: np.ndarray) -> np.ndarray:
    """[B + 1] int64, the entries of all supports before each record."""
    if len(counts) != position_offsets[-1] or (counts < 0).any():
        raise ValueError(f"support_counts has {len(counts)} values for {position_offsets[-1]} positions")
    offsets: np.ndarray = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])[position_offsets]
    return offsets


def _find_offsets(
    name: str, position_offsets: np.ndarray, support_offsets: np.ndarray, num_temperatures: int
) -> np.ndarray:
    """[B + 1] int64, where each record's list begins among the joined values of a column."""
    if name == "token_ids":
        return position_offsets + np.arange(len(position_offsets))
    if name in ("support_ids", *_VALUE_COLUMNS, DRAWS_COLUMN):
        return support_offsets
    return position_offsets * (num_temperatures if name == TEMPERED_COLUMN else 1)


def _read_offsets(column: pa.Array) -> np.ndarray:
    offsets: np.ndarray = column.offsets.to_numpy().astype(np.int64)
    offsets -= offsets[0]
    return offsets


def _read_documents(
    columns: dict[str, pa.Array], values: dict[str, np.ndarray]
) -> tuple[tuple[DocumentSpan, ...], ...]:
    segments = _read_offsets(columns["document_ids"])
    for name in columns.keys() & set(DOCUMENT_COLUMNS):
        if not np.array_equal(_read_offsets(columns[name]), segments):
            raise ValueError(f"{name} and document_ids have lists of other lengths")
    labels: list[str | None] = [None] * int(segments[-1])
    if LABELS_COLUMN in columns:
        labels = columns[LABELS_COLUMN].flatten().to_pylist()
    spans = [
        DocumentSpan(document_id=document_id, start=int(start), document_offset=int(offset), label=label)
        for document_id, start, offset, label in zip(
            columns["document_ids"].flatten().to_pylist(),
            values["document_starts"],
            values["document_offsets"],
            labels,
            strict=True,
        )
    ]
    return tuple(tuple(spans[start:stop]) for start, stop in pairwise(segments.tolist()))
