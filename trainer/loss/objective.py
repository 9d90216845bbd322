"""The training objective of a micro-batch: distillation mixed with cross-entropy, as sums over taught positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from logitstore.errors import ShapeError
from trainer.data import TrainBatch
from trainer.loss.sparse_logits import compute_sparse_losses


@dataclass(frozen=True, kw_only=True)
class DistillationLoss:
    """Sums over the taught positions of a micro-batch.

    Sums, because only the caller knows the number of taught positions of the whole global batch: dividing each
    micro-batch by its own would weigh positions by the company they are in.

    Attributes:
        total: [] float, nats, differentiable.
        bucket_kl: [] float, nats, detached.
        cross_entropy: [] float, nats, detached.
    """

    total: torch.Tensor
    bucket_kl: torch.Tensor
    cross_entropy: torch.Tensor


def compute_distillation_loss(
    student_logits: torch.Tensor, batch: TrainBatch, *, vocab_size: int, distillation_weight: float
) -> DistillationLoss:
    """weight * bucket KL + (1 - weight) * cross-entropy, summed over the positions that may be taught.

    Both parts are computed whatever the weight is, so that a run on the text alone reports its distance from the
    teacher too; the gradient costs the same.

    Args:
        student_logits: [B, T, V'] float; columns from `vocab_size` on are padding of the student's head.
        batch: B sequences of up to T positions.
        vocab_size: ids that the teacher's distribution is over, V <= V'.
        distillation_weight: in [0, 1].

    Raises:
        ShapeError: the logits are not [B, T, V'] with V' >= vocab_size.
    """
    if student_logits.shape[:-1] != batch.input_ids.shape or student_logits.shape[-1] < vocab_size:
        raise ShapeError(
            f"student logits: expected {[*batch.input_ids.shape, vocab_size]} or more columns, "
            f"found {list(student_logits.shape)}"
        )
    kl, cross_entropy = compute_sparse_losses(
        student_logits[..., :vocab_size],
        batch.next_ids,
        batch.support_ids,
        batch.support_logprobs,
        batch.tail_logprob,
    )
    kl_sum = torch.where(batch.loss_mask, kl, 0.0).sum()
    ce_sum = torch.where(batch.loss_mask, cross_entropy, 0.0).sum()
    return DistillationLoss(
        total=distillation_weight * kl_sum + (1 - distillation_weight) * ce_sum,
        bucket_kl=kl_sum.detach(),
        cross_entropy=ce_sum.detach(),
    )
