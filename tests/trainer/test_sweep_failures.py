"""Runs of a sweep that fail, and what they leave to the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from made_up import damage_only_shard
from taught_stores import CONFIG

from logitstore.errors import ConfigError, CorruptShardError, TrainingError
from logitstore.store.logit_store import LogitStore
from trainer.loop import TrainReport, finish_run
from trainer.run import Run
from trainer.run_logs import RunLogs
from trainer.sweep.feed import share
from trainer.sweep.settings import Sweep
from trainer.sweep.training import train_sweep

SMALL = {"config": {**CONFIG, "attention_dropout": 0.2}}
WriteSweep = Callable[..., Sweep]


def test_run_that_cannot_be_evaluated_leaves_the_others_alone(
    write_sweep: WriteSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run: Run, logs: RunLogs) -> TrainReport:
        if run.output.name == "bad":
            raise ConfigError("held_out: expected records with text that both predict")
        return finish_run(run, logs)

    monkeypatch.setattr("trainer.sweep.group.finish_run", refuse)
    report = train_sweep(write_sweep(student=SMALL, runs=[{"name": "bad"}, {"name": "good", "seed": 1}], steps=1))
    assert [(run.name, run.status) for run in report.runs] == [("bad", "failed"), ("good", "finished")]
    assert "that both predict" in str(report.runs[0].error)


def test_finished_run_with_other_weights_of_documents_is_refused(write_sweep: WriteSweep) -> None:
    changes: dict[str, object] = {"student": SMALL, "seeds": [0], "steps": 1, "held_out": None}
    train_sweep(write_sweep(**changes))
    with pytest.raises(TrainingError, match="document_weights"):
        train_sweep(write_sweep(**changes, document_weights={"sources": {"held": 2.0}}))


def test_store_that_cannot_be_read_ends_the_sweep(
    write_sweep: WriteSweep, grow_store: Callable[[range], LogitStore]
) -> None:
    store = grow_store(range(1))
    path = damage_only_shard(store.url)
    sweep = write_sweep(store=store.url, held_out=None, student=SMALL, seeds=[0, 1])
    with pytest.raises(CorruptShardError, match=path.name):
        train_sweep(sweep)


def test_shared_micro_batches_raise_what_failed_in_every_reader() -> None:
    """One that comes second must not take the first one's error for the end of the step."""

    def fail() -> Any:
        yield 1
        raise OSError("the storage is away")

    for reader in share(fail(), 2):
        assert next(reader) == 1
        with pytest.raises(OSError, match="away"):
            next(reader)
