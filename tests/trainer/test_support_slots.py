"""Runs that are taught the first slots of a wider store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from taught_stores import TOP_K, fill_store
from transformers import PreTrainedModel

from logitstore.errors import ConfigError, TrainingError
from logitstore.store.logit_store import LogitStore
from logitstore.teacher.protocol import SampleMethod
from trainer.config import TrainSettings
from trainer.distributed import Processes
from trainer.loop import take_step, train
from trainer.run import prepare_run
from trainer.stores import check_slots_fit_stores

MakeSettings = Callable[..., TrainSettings]
ALONE = Processes(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.mark.parametrize("is_packed", [False, True])
def test_first_slots_of_a_store_teach_what_a_store_of_as_many_does(
    make_settings: MakeSettings, teacher: PreTrainedModel, tmp_path: Path, is_packed: bool
) -> None:
    narrow = fill_store(tmp_path, teacher, range(4), top_k=3)
    results = []
    for changes in ({"support_slots": 3}, {"store": narrow.url}, {"support_slots": TOP_K}):
        run = prepare_run(make_settings(pack_sequences=is_packed, steps=2, **changes), ALONE)
        # The same records of either store: their row groups are cut otherwise, and so is the order.
        batch = run.store.read_row_group(0).slice(0, 4)
        results.append(take_step(run, run.prepare(batch)))
        run.close()
    cut, expected, whole = results
    for name in ("loss", "bucket_kl", "cross_entropy", "gradient_norm"):
        assert getattr(cut, name) == pytest.approx(getattr(expected, name), rel=1e-5)
    assert cut.bucket_kl < 0.99 * whole.bucket_kl  # a wider tail hides more of the distance


def test_run_evaluates_against_all_slots(make_settings: MakeSettings, tmp_path: Path) -> None:
    """A rate so small that both students are as they began."""
    reports = [
        train(make_settings(output=str(tmp_path / str(slots)), steps=1, support_slots=slots, optimizer=FROZEN))
        for slots in (None, 2)
    ]
    assert reports[0].evaluation is not None
    assert reports[1].evaluation is not None
    assert reports[1].evaluation.bucket_kl == pytest.approx(reports[0].evaluation.bucket_kl, rel=1e-5)


FROZEN = {"learning_rate": 1e-12}


def test_run_may_not_change_its_slots(make_settings: MakeSettings) -> None:
    train(make_settings(steps=2, checkpoint_every=1))
    with pytest.raises(TrainingError, match="support_slots\n    in checkpoint: None\n    in this run:   2"):
        train(make_settings(steps=2, support_slots=2))


def test_slots_of_a_drawn_store_are_refused(taught_store: LogitStore, tmp_path: Path, teacher: PreTrainedModel) -> None:
    drawn = fill_store(tmp_path, teacher, range(0), method=SampleMethod(num_draws=4))
    check_slots_fit_stores([taught_store], TOP_K)
    with pytest.raises(ConfigError, match="support_slots: expected a store that keeps the likeliest ids"):
        check_slots_fit_stores([taught_store, drawn], 2)


def test_more_slots_than_any_store_keeps_are_refused(taught_store: LogitStore) -> None:
    with pytest.raises(ConfigError, match=f"support_slots: expected at most the {TOP_K} slots .* found {TOP_K + 1}"):
        check_slots_fit_stores([taught_store], TOP_K + 1)
