"""From ragged record batches to padded tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch

from logitstore.records import RecordBatch


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainBatch:
    """B sequences, padded on the right to the T positions of the longest and the K slots of the widest support.

    Padding positions have input id 0, no support, no tail, and are never taught. Empty slots have id 0 and logprob
    -inf, so they hold no mass.

    Attributes:
        input_ids: [B, T] int64, what the student reads.
        next_ids: [B, T] int64, the token that comes after each position.
        attention_mask: [B, T] int64, 1 at positions of the sequence, 0 at padding.
        loss_mask: [B, T] bool, whether a position is taught.
        support_ids: [B, T, K] int64.
        support_logprobs: [B, T, K] float32, nats.
        tail_logprob: [B, T] float32, nats.
        entropy: [B, T] float32, nats.
        next_token_logprob: [B, T] float32, nats.
    """

    input_ids: torch.Tensor
    next_ids: torch.Tensor
    attention_mask: torch.Tensor
    loss_mask: torch.Tensor
    support_ids: torch.Tensor
    support_logprobs: torch.Tensor
    tail_logprob: torch.Tensor
    entropy: torch.Tensor
    next_token_logprob: torch.Tensor

    def to(self, device: torch.device) -> TrainBatch:
        """The same batch on a device."""
        if device.type == "cpu":
            return self
        return TrainBatch(
            **{field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)}
        )


def collate(batch: RecordBatch) -> TrainBatch:
    """Pad a batch of records to rectangular tensors on the CPU.

    Raises:
        ValueError: the batch holds no record.
    """
    positions_per_record = np.diff(batch.position_offsets)
    B, T = len(batch), int(positions_per_record.max())
    K = max(1, int(batch.support_counts.max()))
    # Of every position in the flat columns: its record, and its cell in a flattened [B, T].
    record = np.repeat(np.arange(B), positions_per_record)
    cell = np.arange(batch.num_positions) - batch.position_offsets[record] + record * T
    # Of every support entry: its cell in a flattened [B, T, K].
    first_entry = np.cumsum(batch.support_counts) - batch.support_counts
    slot = np.arange(len(batch.support_ids)) - np.repeat(first_entry, batch.support_counts)
    slot_cell = np.repeat(cell, batch.support_counts) * K + slot
    # A record has one token more than positions, so its tokens are shifted by one for every record before it.
    token = np.arange(batch.num_positions) + record

    def spread(values: np.ndarray, padding: float, dtype: type[np.generic]) -> torch.Tensor:
        padded = np.full(B * T, padding, dtype=dtype)
        padded[cell] = values
        return torch.from_numpy(padded.reshape(B, T))

    def spread_slots(values: np.ndarray, padding: float, dtype: type[np.generic]) -> torch.Tensor:
        padded = np.full(B * T * K, padding, dtype=dtype)
        padded[slot_cell] = values
        return torch.from_numpy(padded.reshape(B, T, K))

    return TrainBatch(
        input_ids=spread(batch.token_ids[token], 0, np.int64),
        next_ids=spread(batch.token_ids[token + 1], 0, np.int64),
        attention_mask=spread(np.ones(batch.num_positions), 0, np.int64),
        loss_mask=spread(batch.loss_mask, False, np.bool_),
        support_ids=spread_slots(batch.support_ids, 0, np.int64),
        support_logprobs=spread_slots(batch.support_logprobs, -np.inf, np.float32),
        tail_logprob=spread(batch.tail_logprob, -np.inf, np.float32),
        entropy=spread(batch.entropy, 0.0, np.float32),
        next_token_logprob=spread(batch.next_token_logprob, 0.0, np.float32),
    )


def split_batch(batch: RecordBatch, sequences: int) -> Iterator[RecordBatch]:
    """Yield the records of a batch in order, `sequences` at a time, as views; the last part may hold fewer."""
    for start in range(0, len(batch), sequences):
        yield batch.slice(start, min(start + sequences, len(batch)))
