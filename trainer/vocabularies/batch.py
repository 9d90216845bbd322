"""A micro-batch of a student with another tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from logitstore.records import RecordBatch
from trainer.batch import TrainBatch
from trainer.data import collate
from trainer.vocabularies.matching import MatchedTokens, TranslationCounts


@dataclass(frozen=True, kw_only=True, eq=False)
class TranslatedBatch(TrainBatch):
    """Records in the student's tokens, with S spans; a record that the student cannot read at once takes several rows.

    What `TrainBatch` says of the teacher stands at the student's positions that are about the same text as one of the
    teacher's, in the teacher's order; `support_ids` mean nothing to the student and are 0.

    Records that have no position in the student's tokens are one of padding, which attends to itself.

    Attributes:
        span_ids: [B, T] int64, the span that the next token is part of; -1 of none.
        teacher_span_logprobs: [S] float32, nats.
        span_bytes: [S] int64, of text.
        has_signal: [B, T] bool, where support and tail are those of a teacher's position.
        counts: of the records.
    """

    span_ids: torch.Tensor
    teacher_span_logprobs: torch.Tensor
    span_bytes: torch.Tensor
    has_signal: torch.Tensor
    counts: TranslationCounts = field(default_factory=TranslationCounts)

    def to(self, device: torch.device) -> TranslatedBatch:
        """The same batch on a device; from pinned memory, the copy may still be under way."""
        moved = super().to(device)
        assert isinstance(moved, TranslatedBatch)
        return moved


def collate_translated(
    batch: RecordBatch, translated: Sequence[MatchedTokens], *, longest: int | None, with_support: bool
) -> TranslatedBatch:
    """Lay translated records out in rectangular tensors on the CPU.

    Args:
        batch: the records.
        translated: the same in the student's tokens.
        longest: positions that the student reads at once; None where any number.
        with_support: whether to carry the teacher's probabilities along.
    """
    matched = MatchedTokens.join(translated)
    record = np.repeat(np.arange(len(translated)), [len(part.token_ids) for part in translated])
    # The token before, in the same record, is the position that speaks about a token.
    place = np.flatnonzero(record[1:] == record[:-1])
    rows, columns = _lay_out(record[place], longest)
    B, T = int(rows.max(initial=0)) + 1, int(columns.max(initial=0)) + 1

    def spread(values: np.ndarray, padding: int | bool) -> torch.Tensor:
        laid_out = np.full((B, T), padding, dtype=values.dtype)
        laid_out[rows, columns] = values
        return torch.from_numpy(laid_out)

    nothing = torch.zeros(B, T)
    support, tail, has_signal = _take_support(
        batch, spread(record[place], 0), spread(matched.positions[place], -1), with_support=with_support
    )
    return TranslatedBatch(
        input_ids=spread(matched.token_ids[place], 0),
        next_ids=spread(matched.token_ids[place + 1], 0),
        # Models may make NaN of a row that attends to nothing: records without a position attend to their padding.
        attention_mask=spread(np.ones(len(place), dtype=np.int64), 0 if len(place) else 1),
        loss_mask=spread(matched.is_taught[place + 1], False),
        support_ids=torch.zeros(support.shape, dtype=torch.int64),
        support_logprobs=support,
        tail_logprob=tail,
        entropy=nothing,
        next_token_logprob=nothing,
        span_ids=spread(matched.spans[place + 1], -1),
        teacher_span_logprobs=torch.from_numpy(matched.span_logprobs.astype(np.float32)),
        span_bytes=torch.from_numpy(matched.span_bytes),
        has_signal=has_signal,
        counts=matched.counts,
    )


def _lay_out(record: np.ndarray, longest: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every position of ascending records, each of which takes as many rows as it needs."""
    starts = np.searchsorted(record, record, side="left")
    place = np.arange(len(record)) - starts
    if longest is None:
        longest = int(place.max(initial=0)) + 1
    is_new_row = place % longest == 0
    return np.cumsum(is_new_row) - 1, place % longest


def _take_support(
    batch: RecordBatch, records: torch.Tensor, positions: torch.Tensor, *, with_support: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, T, K] logprobs of the support, [B, T] of the tail, and [B, T] where they are some position's."""
    has_signal = positions >= 0
    if not with_support:
        return torch.zeros(*positions.shape, 0), torch.zeros(positions.shape), has_signal
    teacher = collate(batch)
    places = positions.clamp(min=0)
    support = torch.where(has_signal[..., None], teacher.support_logprobs[records, places], -torch.inf)
    return support, torch.where(has_signal, teacher.tail_logprob[records, places], -torch.inf), has_signal
