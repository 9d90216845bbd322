"""DistillKit's data sets, with plain columns and compressed.

Alignment: its sampler drops the first, empty entry of vLLM's prompt logprobs, so that row t of the signal is the
distribution after tokens 0 … t and speaks about token t + 1, as in a store: N input_ids come with N - 1 rows. Its
packing step then cuts input_ids to the number of rows, and its loss compares the student at position t with row t,
unshifted. Only its mask is one off: position t is taught where labels[t], not labels[t + 1], is an id. Labels are
written here the way a causal language model reads them (label t + 1 belongs to position t); DistillKit then leaves out
the first taught position after a prompt, and teaches one beyond the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from logitstore.errors import ConfigError, ShapeError
from logitstore.interchange.distillkit_codec import (
    CompressionConfig,
    compress_logprobs,
    decompress_logprobs,
    pack_ids,
    unpack_ids,
)
from logitstore.interchange.float_bytes import RELATIVE_BOUND
from logitstore.interchange.rows import (
    PADDING_LOGPROB,
    ForeignRow,
    RejectedRowError,
    build_lists,
    build_nested_lists,
    check_lengths,
    check_rows_fit,
    read_list,
    read_rectangle,
)
from logitstore.interchange.supports import build_rectangle
from logitstore.records import RecordBatch

IGNORED_LABEL = -100
_OPTIONAL = ("labels", "attention_mask")


@dataclass(frozen=True, kw_only=True)
class DistillKitLayout:
    """`token_ids` and `top_values`, lists of K ids and of K logprobs for every position.

    Attributes:
        top_k: entries of a position.
        has_labels: whether labels are written; they are needed where a position must not be taught.
        is_trimmed: whether a sequence's last token id is left out, as DistillKit's packing step does.
    """

    top_k: int
    has_labels: bool = False
    is_trimmed: bool = False

    columns = ("input_ids", "token_ids", "top_values")
    optional_columns = _OPTIONAL
    relative_bound = 0.0
    is_renormalized = False

    def build_table(self, batch: RecordBatch) -> pa.Table:
        """See `Layout`."""
        slots = build_rectangle(batch, self.top_k)
        columns = _build_token_columns(batch, has_labels=self.has_labels, is_trimmed=self.is_trimmed)
        columns["token_ids"] = build_nested_lists(slots.ids, batch.position_offsets, pa.int32())
        columns["top_values"] = build_nested_lists(slots.logprobs, batch.position_offsets, pa.float32())
        return pa.table(columns)

    def read_row(self, table: pa.Table, row: int) -> ForeignRow:
        """See `Layout`."""
        ids = read_rectangle(table, "token_ids", row, fill=0)
        logprobs = read_rectangle(table, "top_values", row, fill=PADDING_LOGPROB)
        if ids.shape != logprobs.shape:
            raise RejectedRowError(
                "malformed", f"expected token_ids and top_values of one shape, found {ids.shape} and {logprobs.shape}"
            )
        return _build_row(table, row, ids, logprobs)


@dataclass(frozen=True, kw_only=True)
class CompressedDistillKitLayout:
    """`compressed_logprobs` and `bytepacked_indices`, lists of bytes for every position; see `distillkit_codec`.

    Attributes:
        config: how they are compressed; a data set does not tell.
        has_labels, is_trimmed: as for `DistillKitLayout`.
    """

    config: CompressionConfig
    has_labels: bool = False
    is_trimmed: bool = False

    columns = ("input_ids", "compressed_logprobs", "bytepacked_indices")
    optional_columns = _OPTIONAL
    is_renormalized = False

    @property
    def top_k(self) -> int:
        """Entries of a position."""
        return self.config.k

    @property
    def relative_bound(self) -> float | None:
        """See `Layout`."""
        if not self.config.is_exact:
            return None
        return 0.0 if self.config.exact_dtype in ("float32", "float64") else RELATIVE_BOUND[self.config.exact_dtype]

    def build_table(self, batch: RecordBatch) -> pa.Table:
        """See `Layout`."""
        slots = build_rectangle(batch, self.top_k)
        if not self.config.is_exact and (slots.counts < self.top_k).any():
            short = int(np.argmax(slots.counts < self.top_k))
            raise ConfigError(
                f"record {_find_address(batch, short)}: expected {self.top_k} entries at every position, for a "
                f"polynomial to run through, found {int(slots.counts[short])}; choose a smaller --top-k, a compression "
                "config that stores all of them exactly, or the layout 'distillkit'"
            )
        columns = _build_token_columns(batch, has_labels=self.has_labels, is_trimmed=self.is_trimmed)
        packed = (compress_logprobs(slots.logprobs, self.config), pack_ids(slots.ids, self.config))
        for name, data in zip(self.columns[1:], packed, strict=True):
            columns[name] = build_nested_lists(data, batch.position_offsets, pa.uint8())
        return pa.table(columns)

    def read_row(self, table: pa.Table, row: int) -> ForeignRow:
        """See `Layout`."""
        logprobs, ids = (read_rectangle(table, name, row).astype(np.uint8) for name in self.columns[1:])
        check_lengths(compressed_logprobs=len(logprobs), bytepacked_indices=len(ids))
        try:
            return _build_row(table, row, unpack_ids(ids, self.config), decompress_logprobs(logprobs, self.config))
        except ShapeError as error:
            raise RejectedRowError("malformed", str(error)) from None


def build_exact_config(vocab_size: int, top_k: int) -> CompressionConfig:
    """A config that stores every logprob as a float16 of its own: as small as bfloat16, and sixty times closer."""
    return CompressionConfig(d=vocab_size, k=top_k, exact_k=top_k, exact_dtype="float16", delta_encoding=False)


def build_labels(batch: RecordBatch) -> np.ndarray:
    """[P + B] int64 like `token_ids`: each record's first id, then the next ids of positions that may be taught."""
    is_taught = np.insert(batch.loss_mask, batch.position_offsets[:-1], True)
    return np.where(is_taught, batch.token_ids, IGNORED_LABEL).astype(np.int64)


def _build_token_columns(batch: RecordBatch, *, has_labels: bool, is_trimmed: bool) -> dict[str, pa.Array]:
    offsets = batch.position_offsets + (0 if is_trimmed else np.arange(len(batch) + 1))
    kept = np.ones(len(batch.token_ids), dtype=bool)
    if is_trimmed:
        kept[batch.position_offsets[1:] + np.arange(len(batch))] = False
    # Unsigned, as in the schema of DistillKit's sampler.
    columns = {"input_ids": build_lists(batch.token_ids[kept].astype(np.uint64), offsets, pa.uint64())}
    if has_labels:
        columns["labels"] = build_lists(build_labels(batch)[kept], offsets, pa.int64())
    return columns


def _build_row(table: pa.Table, row: int, ids: np.ndarray, logprobs: np.ndarray) -> ForeignRow:
    token_ids = read_list(table, "input_ids", row).astype(np.int64)
    check_rows_fit(len(token_ids), len(ids), table.column_names[-1])
    loss_mask, segments = read_masks(table, row, len(token_ids))
    return ForeignRow(
        token_ids=token_ids,
        loss_mask=loss_mask[: len(ids)],
        ids=ids.astype(np.int64),
        logprobs=logprobs.astype(np.float32),
        segments=segments,
    )


def read_masks(table: pa.Table, row: int, tokens: int) -> tuple[np.ndarray, np.ndarray | None]:
    """[N] bool, whether a position's next token has a label (True without labels); and the attention mask, or None."""
    loss_mask = np.ones(tokens, dtype=bool)
    segments = None
    if "labels" in table.column_names:
        labels = read_list(table, "labels", row)
        check_lengths(input_ids=tokens, labels=len(labels))
        loss_mask[:-1] = labels[1:] >= 0
    if "attention_mask" in table.column_names:
        segments = read_list(table, "attention_mask", row).astype(np.int64)
        check_lengths(input_ids=tokens, attention_mask=len(segments))
    return loss_mask, segments


def _find_address(batch: RecordBatch, position: int) -> str:
    record = int(np.searchsorted(batch.position_offsets, position, side="right")) - 1
    return str(batch.addresses()[record])
