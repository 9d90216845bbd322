"""Evaluation against figures computed by hand, and of the teacher itself."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import VOCAB_SIZE, build_records
from made_up_draws import draw_signal
from transformers import PreTrainedModel

from logitstore.errors import ConfigError
from logitstore.records import Record, RecordBatch
from logitstore.store.logit_store import LogitStore
from logitstore.stream.selection import HeldOut, select_records
from logitstore.stream.where import Where
from trainer.batch import TrainBatch
from trainer.config import EvaluateSettings
from trainer.data import collate
from trainer.distributed import Processes
from trainer.evaluate import (
    CALIBRATION_BINS,
    Evaluation,
    build_evaluation,
    compute_evaluation_sums,
    evaluate,
    evaluate_student,
    evaluate_students,
)
from trainer.loss.divergences import bucket_forward_kl, bucket_overlap
from trainer.loss.support_losses import weighted_cross_entropy
from trainer.micro_batches import MicroBatches
from trainer.sources import read_records

ALONE = Processes(rank=0, world_size=1, device=torch.device("cpu"))


def build_batch(student_probs: list[list[float]], next_ids: list[int], taught: list[bool]) -> TrainBatch:
    """One sequence whose teacher keeps one slot: id 0 with probability 0.6."""
    T = len(student_probs)
    return TrainBatch(
        input_ids=torch.zeros(1, T, dtype=torch.int64),
        next_ids=torch.tensor([next_ids]),
        attention_mask=torch.ones(1, T, dtype=torch.int64),
        loss_mask=torch.tensor([taught]),
        support_ids=torch.zeros(1, T, 1, dtype=torch.int64),
        support_logprobs=torch.full((1, T, 1), math.log(0.6)),
        tail_logprob=torch.full((1, T), math.log(0.4)),
        entropy=torch.zeros(1, T),
        next_token_logprob=torch.full((1, T), math.log(0.5)),
    )


def test_evaluation_of_four_positions_equals_the_sums_by_hand() -> None:
    probs = [[0.9, 0.05, 0.05], [0.9, 0.05, 0.05], [0.2, 0.7, 0.1], [0.25, 0.7, 0.05], [1 / 3, 1 / 3, 1 / 3]]
    batch = build_batch(probs, next_ids=[0, 1, 1, 1, 0], taught=[True, True, True, True, False])
    found = build_evaluation(compute_evaluation_sums(torch.tensor([probs]).log(), batch).numpy())
    assert found.positions == 4
    lm_loss = -(math.log(0.9) + math.log(0.05) + 2 * math.log(0.7)) / 4
    assert found.lm_loss == pytest.approx(lm_loss, abs=1e-6)
    assert found.perplexity == pytest.approx(math.exp(lm_loss), abs=1e-5)
    assert found.teacher_lm_loss == pytest.approx(math.log(2), abs=1e-6)
    assert found.top1_agreement == 0.5
    # Confidence 0.9 twice, once right; 0.7 twice, both right.
    assert found.calibration_error == pytest.approx(100 * (abs(0.5 - 0.9) + abs(1.0 - 0.7)) / 2, abs=1e-4)
    assert found.overlap == pytest.approx((2 * (0.6 + 0.1) + (0.2 + 0.4) + (0.25 + 0.4)) / 4, abs=1e-6)
    kls = [0.6 * math.log(0.6 / q) + 0.4 * math.log(0.4 / (1 - q)) for q in (0.9, 0.9, 0.2, 0.25)]
    assert found.bucket_kl == pytest.approx(sum(kls) / 4, abs=1e-6)
    filled = {i: (n, found.bin_confidence[i], found.bin_accuracy[i]) for i, n in enumerate(found.bin_positions) if n}
    assert filled == {13: (2, pytest.approx(0.9), 0.5), 10: (2, pytest.approx(0.7), 1.0)}


@pytest.mark.parametrize("tail", [1e-3, 1e-7, 1e-9, 1e-12])
def test_evaluation_of_a_student_with_hardly_any_tail_knows_how_little(tail: float) -> None:
    """Float32 logits against float64 sums of the same logits: what is left are roundings of single logprobs."""
    batch = build_batch([[0.0, 0.0, 0.0]], next_ids=[0], taught=[True])
    logits = torch.tensor([[[1 - tail, 0.75 * tail, 0.25 * tail]]], dtype=torch.float64).log().float()
    exact = logits.double()[0, 0]
    log_q = exact[0] - exact.logsumexp(-1)
    log_q_r = exact[1:].logsumexp(-1) - exact.logsumexp(-1)
    p, r = batch.support_logprobs.double().exp().item(), batch.tail_logprob.double().exp().item()
    kl = p * (math.log(p) - log_q.item()) + r * (math.log(r) - log_q_r.item())
    found = build_evaluation(compute_evaluation_sums(logits, batch).numpy())
    assert found.bucket_kl == pytest.approx(kl, rel=1e-6)
    assert found.overlap == pytest.approx(p + min(r, tail), rel=1e-6)


def test_evaluation_equals_the_definitions(taught_records: list[Record]) -> None:
    batch = collate(RecordBatch.from_records(taught_records))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*batch.input_ids.shape, VOCAB_SIZE, dtype=torch.float64, generator=generator)
    signal = (batch.support_ids, batch.support_logprobs, batch.tail_logprob)
    found = build_evaluation(compute_evaluation_sums(logits, batch).numpy())
    assert found.bucket_kl == pytest.approx(float(bucket_forward_kl(logits, *signal)[batch.loss_mask].mean()), rel=1e-9)
    assert found.overlap == pytest.approx(float(bucket_overlap(logits, *signal)[batch.loss_mask].mean()), rel=1e-9)


def test_evaluation_bins_certainty_in_the_last_bin() -> None:
    logits = torch.tensor([[[100.0, 0.0, 0.0]]])
    found = build_evaluation(compute_evaluation_sums(logits, build_batch([[1, 0, 0]], [0], [True])).numpy())
    assert found.bin_positions == (0,) * (CALIBRATION_BINS - 1) + (1,)
    assert found.calibration_error == 0.0


def test_evaluation_leaves_impossible_tokens_out_of_the_teachers_loss() -> None:
    batch = build_batch([[0.5, 0.3, 0.2]] * 2, [0, 0], [True, True])
    batch.next_token_logprob[0, 0] = -math.inf
    found = build_evaluation(compute_evaluation_sums(torch.zeros(1, 2, 3), batch).numpy())
    assert found.positions == 2
    assert found.teacher_lm_loss == pytest.approx(math.log(2), abs=1e-6)


def test_evaluation_on_a_store_that_does_not_know_the_teachers_loss_says_so() -> None:
    batch = build_batch([[0, 0, 0], [0, 0, 0]], next_ids=[0, 0], taught=[True, True])
    batch.next_token_logprob[0, 1] = math.nan
    found = build_evaluation(compute_evaluation_sums(torch.zeros(1, 2, 3), batch).numpy())
    assert found.teacher_lm_loss is None
    assert "teacher_lm_loss" not in found.list_scalars()
    assert found.lm_loss == pytest.approx(math.log(3))


def test_evaluation_without_taught_positions_is_refused() -> None:
    sums = compute_evaluation_sums(torch.zeros(1, 1, 3), build_batch([[0, 0, 0]], [0], [False]))
    with pytest.raises(ConfigError, match="taught positions, found none"):
        build_evaluation(sums.numpy())


@pytest.mark.parametrize("kind", ["sample", "head_tail"])
def test_evaluation_on_drawn_supports_estimates_the_whole_kl_and_says_nothing_it_cannot_know(kind: str) -> None:
    """2,000 draws at two positions: the mean of the estimate is the KL over the vocabulary, within its own noise."""
    generator = np.random.default_rng(0)
    logits = np.repeat(generator.normal(0, [[1.0], [3.0]], (2, 200)), 1000, axis=0)
    student = torch.from_numpy(np.repeat(generator.normal(0, 2, (2, 200)), 1000, axis=0))
    token_ids = generator.integers(0, 200, 2001).astype(np.int32)
    [record] = build_records(1, length=2000, ragged=False, vocab_size=200)
    signal = draw_signal(logits, token_ids[1:], kind, generator)
    record = replace(record, token_ids=token_ids, loss_mask=np.ones(2000, bool), signal=signal)
    batch = collate(RecordBatch.from_records([record]))

    found = build_evaluation(compute_evaluation_sums(student[None], batch).numpy())

    teacher = torch.from_numpy(logits).log_softmax(-1)
    kl = (teacher.exp() * (teacher - student.log_softmax(-1))).sum(-1)
    assert batch.support_weights is not None
    estimates = weighted_cross_entropy(student[None], batch.support_ids, batch.support_weights) - batch.entropy
    noise = float(estimates[0].view(2, 1000).var(1).sum() / 1000 / 4) ** 0.5
    assert found.kl_estimate == pytest.approx(float(kl.mean()), abs=4 * noise)
    assert noise < 0.05
    assert (found.bucket_kl, found.overlap, found.top1_agreement) == (None, None, None)
    assert {"bucket_kl", "overlap", "top1_agreement"} & found.list_scalars().keys() == set()

    kept = replace(batch, support_weights=None)
    other = build_evaluation(compute_evaluation_sums(student[None], kept).numpy())
    assert (found.lm_loss, found.calibration_error, found.teacher_lm_loss) == (
        other.lm_loss,
        other.calibration_error,
        other.teacher_lm_loss,
    )
    assert other.kl_estimate is None
    assert "kl_estimate" not in other.list_scalars()


def evaluate_all(student: PreTrainedModel, store: LogitStore, *, micro_batch_sequences: int = 4) -> Evaluation:
    return evaluate(
        student,
        (store.read_row_group(i) for i in range(store.num_row_groups)),
        vocab_size=store.plan.teacher.vocab_size,
        micro_batches=MicroBatches(sequences=micro_batch_sequences),
        precision="float32",
        processes=ALONE,
    )


def test_evaluation_of_the_teacher_finds_no_distance_from_itself(
    teacher: PreTrainedModel, taught_store: LogitStore
) -> None:
    found = evaluate_all(teacher, taught_store)
    # The store keeps float32 logprobs of magnitude 10, and the student runs padded to another length.
    assert abs(found.bucket_kl) < 1e-6
    assert found.overlap == pytest.approx(1.0, abs=1e-5)
    assert found.lm_loss == pytest.approx(found.teacher_lm_loss, abs=1e-5)
    assert found.top1_agreement == 1.0
    assert found.positions == taught_store.compute_statistics().taught_positions


def test_evaluation_of_the_teacher_against_shifted_targets_shows_it(
    teacher: PreTrainedModel, taught_store: LogitStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shift(batch: TrainBatch) -> TrainBatch:
        object.__setattr__(batch, "support_ids", batch.support_ids.roll(1, dims=1))
        object.__setattr__(batch, "support_logprobs", batch.support_logprobs.roll(1, dims=1))
        object.__setattr__(batch, "tail_logprob", batch.tail_logprob.roll(1, dims=1))
        return batch

    monkeypatch.setattr(TrainBatch, "to", lambda batch, device: shift(batch))
    found = evaluate_all(teacher, taught_store)
    assert found.bucket_kl > 0.5
    assert found.top1_agreement < 0.5


def test_evaluation_does_not_depend_on_the_micro_batch(teacher: PreTrainedModel, taught_store: LogitStore) -> None:
    one, many = (evaluate_all(teacher, taught_store, micro_batch_sequences=n) for n in (3, 16))
    for name, value in one.list_scalars().items():
        assert many.list_scalars()[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_evaluation_leaves_the_student_in_its_mode(teacher: PreTrainedModel, taught_store: LogitStore) -> None:
    assert not teacher.training
    evaluate_all(teacher, taught_store)
    assert not teacher.training
    teacher.train()
    try:
        evaluate_all(teacher, taught_store)
        assert teacher.training
    finally:
        teacher.eval()


def test_evaluate_student_of_a_saved_folder_reads_only_what_is_held_out(
    teacher: PreTrainedModel, taught_store: LogitStore, tmp_path: Path
) -> None:
    teacher.save_pretrained(tmp_path)
    values = {"store": taught_store.url, "student": str(tmp_path), "device": "cpu"}
    held_out = evaluate_student(EvaluateSettings.model_validate({**values, "held_out": {"source": "held"}}))
    everything = evaluate_student(EvaluateSettings.model_validate(values))
    assert held_out.positions == taught_store.compute_statistics("held").taught_positions
    assert everything.positions == taught_store.compute_statistics().taught_positions
    assert np.isclose(everything.bucket_kl, 0, atol=1e-6)


def test_evaluate_student_takes_the_conditions_of_the_run(
    taught_store: LogitStore, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    """Or its figures would not be those of the run's own evaluations."""
    teacher.save_pretrained(tmp_path)
    middle = float(np.nanmedian(taught_store.read_record_statistics(3).mean_entropy))  # of the source
    where, held_out = {"entropy": {"max": middle}}, {"source": "held"}
    _, chosen = select_records(taught_store, Where.model_validate(where), HeldOut.model_validate(held_out))
    _, whole = select_records(taught_store, None, HeldOut.model_validate(held_out))
    values = {"store": taught_store.url, "student": str(tmp_path), "device": "cpu", "held_out": held_out}
    found = evaluate_student(EvaluateSettings.model_validate({**values, "where": where}))
    batches = read_records(taught_store, chosen, ALONE)
    assert 0 < len(chosen) < len(whole)
    assert found.positions == sum(int(batch.loss_mask.sum()) for batch in batches)


def test_student_that_is_not_there_is_told_before_any_other_is_evaluated(tmp_path: Path) -> None:
    settings = EvaluateSettings(store=str(tmp_path / "not opened"), student="")
    with pytest.raises(ConfigError, match=r"student: .* found no folder '.*/none'; check the path"):
        next(evaluate_students(settings, [str(tmp_path), str(tmp_path / "none")]))
