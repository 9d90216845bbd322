"""Losses of students with another tokenizer than the teacher's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from taught_stores import build_model
from vocabularies import build_reader

from logitstore.store.logit_store import LogitStore
from trainer.loss.settings import LossSettings
from trainer.vocabularies.batch import TranslatedBatch
from trainer.vocabularies.settings import OtherTokenizerSettings
from trainer.vocabularies.student_reader import StudentReader
from trainer.vocabularies.taught_student import TranslatedStudent, compute_translated_loss, sum_spans

METHODS = ("spans", "sorted_probabilities")


def read_batch(reader: StudentReader, store: LogitStore) -> TranslatedBatch:
    return reader.collate(store.read_row_group(0, with_documents=True))


@pytest.mark.parametrize("method", METHODS)
def test_loss_of_micro_batches_adds_up_to_that_of_the_whole(
    text_store: LogitStore, other_tokenizer: str, method: str
) -> None:
    reader = build_reader(text_store, method, other_tokenizer)
    student = build_model(seed=3, vocab_size=reader.vocab_size, max_position_embeddings=128)
    taught = TranslatedStudent(
        student,
        LossSettings(),
        OtherTokenizerSettings(method=method),
        vocab_size=reader.vocab_size,
        precision="float32",
    )
    batch = text_store.read_row_group(0, with_documents=True)
    whole = taught(reader.collate(batch), 0.7)
    parts = [taught(reader.collate(batch.slice(i, i + 1)), 0.7) for i in range(len(batch))]
    for name in ("total", "distillation", "bucket_kl", "cross_entropy"):
        torch.testing.assert_close(
            getattr(whole, name), sum(getattr(part, name) for part in parts), rtol=1e-4, atol=1e-3
        )
    assert taught.counts.spans == 2 * len(reader.collate(batch).teacher_span_logprobs)


def test_loss_beside_cross_entropy_kind_is_that_of_the_text(text_store: LogitStore, other_tokenizer: str) -> None:
    reader = build_reader(text_store, "spans", other_tokenizer)
    batch = read_batch(reader, text_store)
    student = build_model(seed=3, vocab_size=reader.vocab_size, max_position_embeddings=128)
    losses = [
        TranslatedStudent(
            student,
            LossSettings(kind=kind),
            OtherTokenizerSettings(method="spans"),
            vocab_size=reader.vocab_size,
            precision="float32",
        )(batch, weight)
        for kind, weight in (("cross_entropy", 0.8), ("bucket_kl", 0.0))
    ]
    logits = student(**batch.model_inputs).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch.next_ids.flatten(), reduction="none")
    expected = expected[batch.loss_mask.flatten()].sum()
    for loss in losses:
        torch.testing.assert_close(loss.total, expected)
        torch.testing.assert_close(loss.cross_entropy, expected.detach())


@pytest.mark.parametrize("method", METHODS)
def test_loss_has_the_gradient_of_finite_differences(text_store: LogitStore, other_tokenizer: str, method: str) -> None:
    reader = build_reader(text_store, method, other_tokenizer)
    batch = reader.collate(text_store.read_row_group(0, with_documents=True).slice(0, 1))
    settings = OtherTokenizerSettings(method=method)
    torch.manual_seed(0)
    # A basis that logits move along, so that few differences are taken.
    logits = torch.randn(*batch.input_ids.shape, reader.vocab_size, dtype=torch.float64)
    direction = torch.randn(3, *logits.shape, dtype=torch.float64)

    def compute(steps: torch.Tensor) -> torch.Tensor:
        moved = logits + torch.einsum("k,kbtv->btv", steps, direction)
        return compute_translated_loss(moved, batch, settings, distillation_weight=0.6).total

    assert torch.autograd.gradcheck(compute, torch.zeros(3, dtype=torch.float64, requires_grad=True))


def test_spans_that_are_as_likely_for_the_student_teach_it_nothing(
    text_store: LogitStore, other_tokenizer: str
) -> None:
    reader = build_reader(text_store, "spans", other_tokenizer)
    batch = read_batch(reader, text_store)
    logits = torch.randn(*batch.input_ids.shape, reader.vocab_size, dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(-1).gather(-1, batch.next_ids[..., None])[..., 0]
    equal = replace(batch, teacher_span_logprobs=sum_spans(logprobs.detach(), batch))
    settings = OtherTokenizerSettings(method="spans")
    loss = compute_translated_loss(logits, equal, settings, distillation_weight=1.0)
    loss.total.backward()
    assert logits.grad is not None
    assert abs(loss.total.item()) < 1e-10
    assert logits.grad.abs().max() < 1e-10
