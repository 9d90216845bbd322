"""Trainer of transformers behind the last step of its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from taught_stores import build_model
from transformers import TrainingArguments

from logitstore.store.logit_store import LogitStore
from logitstore.stream.iterator import RecordStream
from trainer.huggingface import DistillationTrainer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def train_to(steps: int, store: LogitStore, output: Path, checkpoint: str | None) -> DistillationTrainer:
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        save_steps=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DistillationTrainer(build_model(3), args, stream=RecordStream(store, global_batch_sequences=8))
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def test_trainer_that_is_done_makes_no_step_and_goes_on_where_there_are_more(
    taught_store: LogitStore, tmp_path: Path
) -> None:
    whole = train_to(4, taught_store, tmp_path / "whole", None)
    done = train_to(4, taught_store, tmp_path / "whole", str(tmp_path / "whole/checkpoint-4"))
    assert (whole.state.global_step, done.state.global_step) == (4, 4)
    for found, expected in zip(done.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    more = train_to(6, taught_store, tmp_path / "whole", str(tmp_path / "whole/checkpoint-4"))
    assert more.state.global_step == 6
