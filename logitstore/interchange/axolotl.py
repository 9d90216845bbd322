"""axolotl's columns for offline distillation: a tokenized data set with targets.

Alignment: axolotl's loss compares the student at position j with row j of the targets, unshifted, so row j must speak
about token j + 1: its documentation calls that target alignment, and "next" means it here. Its own preparation of chat
data put rows one position too late for a while (row j about token j), and its first trainers left out row 0 to make up
for that: "same" reads and writes such data. axolotl takes a data set of these columns, with an empty `type:`, as it is,
so that no preparation can shift it.

Its loss takes the targets for a whole distribution over the K entries, and renormalizes the student's likewise unless
`kd_normalize_topk: false` is set; then logprobs over the vocabulary are right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from logitstore.interchange.distillkit import build_labels, read_masks
from logitstore.interchange.layout import Alignment
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
from logitstore.interchange.supports import build_rectangle, renormalize
from logitstore.records import RecordBatch

# axolotl's own filling for slots that are not used.
_UNUSED_LOGPROB = -1e9


@dataclass(frozen=True, kw_only=True)
class AxolotlLayout:
    """`input_ids`, `attention_mask`, `labels`, and lists of K values for every token: ids, logprobs and mask.

    Attributes:
        top_k: entries of a position.
        alignment: "next": row j speaks about token j + 1; "same": about token j.
        is_renormalized: whether logprobs are written normalized over the K entries.
    """

    top_k: int
    alignment: Alignment = "next"
    is_renormalized: bool = True

    columns = ("input_ids", "target_token_ids", "target_logprobs")
    optional_columns = ("attention_mask", "labels", "target_mask")

    @property
    def relative_bound(self) -> float | None:
        """See `Layout`."""
        return 2.0**-23 if self.is_renormalized else 0.0

    def build_table(self, batch: RecordBatch) -> pa.Table:
        """See `Layout`."""
        slots = build_rectangle(batch, self.top_k)
        is_used = slots.is_used
        logprobs = renormalize(slots) if self.is_renormalized else slots.logprobs
        offsets = batch.position_offsets + np.arange(len(batch) + 1)
        labels = build_labels(batch)
        labels[offsets[:-1]] = -100  # no position speaks about a first token
        return pa.table(
            {
                "input_ids": build_lists(batch.token_ids, offsets, pa.int32()),
                "attention_mask": build_lists(np.ones(len(batch.token_ids), dtype=np.int8), offsets, pa.int8()),
                "labels": build_lists(labels, offsets, pa.int64()),
                "target_token_ids": self._build_targets(batch, np.where(is_used, slots.ids, 0), 0, pa.int32()),
                "target_logprobs": self._build_targets(
                    batch, np.where(is_used, logprobs, _UNUSED_LOGPROB), _UNUSED_LOGPROB, pa.float32()
                ),
                "target_mask": self._build_targets(batch, is_used & batch.loss_mask[:, None], 0, pa.int8()),
            }
        )

    def _build_targets(
        self, batch: RecordBatch, rectangle: np.ndarray, filling: float, value_type: pa.DataType
    ) -> pa.Array:
        """Lists for every token: one row of filling after a record's positions, or before them."""
        edges = batch.position_offsets[1:] if self.alignment == "next" else batch.position_offsets[:-1]
        offsets = batch.position_offsets + np.arange(len(batch) + 1)
        filled = np.insert(rectangle, edges, filling, axis=0)
        return build_nested_lists(filled.astype(value_type.to_pandas_dtype()), offsets, value_type)

    def read_row(self, table: pa.Table, row: int) -> ForeignRow:
        """See `Layout`."""
        token_ids = read_list(table, "input_ids", row).astype(np.int64)
        ids = read_rectangle(table, "target_token_ids", row, fill=0).astype(np.int64)
        logprobs = read_rectangle(table, "target_logprobs", row, fill=PADDING_LOGPROB).astype(np.float32)
        check_rows_fit(len(token_ids), len(ids), "target_token_ids")
        if ids.shape != logprobs.shape:
            raise RejectedRowError(
                "malformed",
                f"expected target_token_ids and target_logprobs of one shape, found {ids.shape} and {logprobs.shape}",
            )
        loss_mask, segments = read_masks(table, row, len(token_ids))
        first = 1 if self.alignment == "same" else 0
        loss_mask = loss_mask[: len(ids) - first]
        if "target_mask" in table.column_names:
            mask = read_rectangle(table, "target_mask", row, fill=0).astype(bool)
            check_lengths(target_token_ids=len(ids), target_mask=len(mask))
            loss_mask = np.asarray(mask.any(axis=1))[first:]
        return ForeignRow(
            token_ids=token_ids, loss_mask=loss_mask, ids=ids[first:], logprobs=logprobs[first:], segments=segments
        )
