"""What a student says at the positions of sampled records: it is run over their text, without the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from logitstore.errors import ConfigError
from logitstore.records import Record, RecordBatch
from logitstore.store.logit_store import LogitStore
from tools.store_report.numbers import encode_nats, encode_shares
from tools.store_report.sample import Sample
from tools.store_report.voices import LEAST_PROBABILITY, Voice, find_next_ids, join_voices, lay_out_candidates
from trainer.batch import TrainBatch
from trainer.config import StudentSettings
from trainer.data import collate
from trainer.evaluate import compute_logits, evaluation_mode
from trainer.evaluation import Evaluation
from trainer.evaluation_sums import FIGURES, NUM_SUMS, PositionFigures, add_up, build_evaluation
from trainer.evaluation_sums import compute_position_figures as compute_figures
from trainer.micro_batches import split_by_tokens
from trainer.student import build_student, check_student_fits
from trainer.vocabularies.student_reader import find_student_reader

_TOKENS_PER_PASS = 2048


def find_student_folder(folder: str) -> str:
    """The folder of a student that is named by itself or by the run that left it."""
    return str(Path(folder) / "student") if (Path(folder) / "student").is_dir() else folder


def add_students(
    sample: Sample, store: LogitStore, folders: Sequence[str], names: Sequence[str], top: int
) -> tuple[Sample, dict[str, Evaluation]]:
    """The sample with the students' voices behind its own, and their figures on its taught positions.

    Raises:
        ConfigError, IncompatibleStoreError: as in `listen_to_student`.
    """
    voices, evaluations = list(sample.voices), {}
    for name, folder in zip(names, folders, strict=True):
        voice, evaluation = listen_to_student(name, folder, store, sample.records, top)
        voices.append(voice)
        if evaluation is not None:
            evaluations[name] = evaluation
    return replace(sample, voices=tuple(voices)), evaluations


def listen_to_student(
    name: str, folder: str, store: LogitStore, records: Sequence[Record], top: int
) -> tuple[Voice, Evaluation | None]:
    """A student's voice at the positions of records, and its figures on them; None where none is taught.

    Args:
        name: of the voice.
        folder: that transformers loads, or of a run with one.
        store: that the records are of.
        records: one or more.
        top: candidates at each position.
    Raises:
        ConfigError: transformers cannot load it, or it reads text as other tokens than the teacher.
        IncompatibleStoreError: it reads fewer ids, or fewer positions, than the records have.
    """
    path = find_student_folder(folder)
    if find_student_reader(path, store) is not None:
        raise ConfigError(
            f"{path}: expected a student with the teacher's tokenizer, found another one; 'logitstore evaluate' "
            "compares it by spans of text, and --run shows the curves of its run"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = build_student(StudentSettings(model=path), store.plan.teacher, seed=0, device=device)
    check_student_fits(student, store)
    sums, parts = np.zeros(NUM_SUMS), []
    with evaluation_mode(student):
        for record in records:
            # One at a time: in the records' order, and without padding.
            [batch] = split_by_tokens(RecordBatch.from_records([record]), _TOKENS_PER_PASS)
            inputs = collate(batch).to(device)
            logits = compute_logits(student, inputs, "float32")[..., : store.plan.teacher.vocab_size]
            figures = compute_figures(logits, inputs)
            sums += add_up(figures).cpu().numpy()
            parts.append(_build_part(name, batch, inputs, logits, figures, top))
    is_any_taught = any(record.loss_mask.any() for record in records)
    evaluation = build_evaluation(sums, is_likeliest_kept=store.plan.is_likeliest_kept) if is_any_taught else None
    return join_voices(parts), evaluation


def _build_part(
    name: str, batch: RecordBatch, inputs: TrainBatch, logits: torch.Tensor, figures: PositionFigures, top: int
) -> Voice:
    """The voice at the P positions of one record."""
    logprobs = logits[0].float().log_softmax(-1)
    next_logprob = logprobs.gather(-1, inputs.next_ids[0][:, None])[:, 0].cpu().numpy()
    best, ids = (values.cpu().numpy() for values in logprobs.topk(min(top, logprobs.shape[-1]), dim=-1))
    probabilities = np.exp(best.astype(np.float64))
    shown = probabilities >= LEAST_PROBABILITY
    shown[:, 0] = True
    positions = np.nonzero(shown)[0]
    entropy = -(logprobs.exp() * logprobs).sum(-1).cpu().numpy()
    kl = np.full(batch.num_positions, np.nan)
    kl[batch.loss_mask] = figures.values[:, _find_kl(batch)].cpu().numpy()
    next_values = encode_shares(np.exp(next_logprob.astype(np.float64)))
    values = encode_shares(probabilities)[shown]
    return Voice(
        name=name,
        is_drawn=False,
        candidates=lay_out_candidates(positions, ids[shown], values, find_next_ids(batch), next_values),
        surprise=encode_nats(-next_logprob.astype(np.float64)),
        entropy=encode_nats(entropy),
        tail=encode_shares(np.full(batch.num_positions, np.nan)),
        kl=encode_shares(np.maximum(kl, 0.0)),
    )


def _find_kl(batch: RecordBatch) -> int:
    return FIGURES.index("bucket_kl" if batch.support_draws is None else "kl_estimate")
