"""How runs end that cannot go on, and what every run leaves behind in its process."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable

import pytest
import torch
from made_up import VOCAB_SIZE, damage_only_shard

from logitstore.errors import CorruptShardError, IncompatibleStoreError, TrainingError
from logitstore.store.logit_store import LogitStore
from trainer.config import TrainSettings
from trainer.distributed import Processes
from trainer.loop import TrainReport, take_step, train
from trainer.run import prepare_run

MakeSettings = Callable[..., TrainSettings]


def test_step_with_a_loss_that_is_not_finite_names_step_and_records_and_changes_nothing(
    make_settings: MakeSettings,
) -> None:
    run = prepare_run(make_settings(max_skipped_steps=0), Processes(rank=0, world_size=1, device=torch.device("cpu")))
    batch = next(run.stream)
    run.close()
    with torch.no_grad():
        run.student.get_output_embeddings().weight[0, 0] = math.nan
    before = [parameter.detach().clone() for parameter in run.student.parameters()]
    with pytest.raises(TrainingError, match="step 0: expected a finite loss") as raised:
        take_step(run, run.prepare(batch))
    assert all(str(address) in str(raised.value) for address in batch.addresses())
    for parameter, value in zip(run.student.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, value, rtol=0, atol=0, equal_nan=True)


def test_run_over_a_student_of_too_small_a_vocabulary_is_refused(make_settings: MakeSettings) -> None:
    config = {**(make_settings().student.config or {}), "vocab_size": VOCAB_SIZE - 1}
    with pytest.raises(IncompatibleStoreError, match="narrower"):
        train(make_settings(student={"config": config}))


def test_run_over_a_damaged_store_ends_with_what_is_wrong(
    make_settings: MakeSettings, grow_store: Callable[[range], LogitStore]
) -> None:
    """The error of a reading thread comes through the one that prepares micro-batches, which ends too."""
    store = grow_store(range(1))
    path = damage_only_shard(store.url)
    threads = set(threading.enumerate())
    with pytest.raises(CorruptShardError, match=path.name):
        train(make_settings(store=store.url, held_out=None))
    prepared = [thread for thread in set(threading.enumerate()) - threads if thread.name == "logitstore-prefetch"]
    assert prepared == []


def test_run_in_another_thread_than_the_main_one_trains(make_settings: MakeSettings) -> None:
    """Only the main thread may handle signals; Ray Train runs loops in others."""
    reports: list[TrainReport] = []
    thread = threading.Thread(target=lambda: reports.append(train(make_settings(steps=2))))
    thread.start()
    thread.join()
    assert [report.steps for report in reports] == [2]


def test_run_leaves_neither_its_signal_handler_nor_its_threads(make_settings: MakeSettings) -> None:
    handler, threads = signal.getsignal(signal.SIGTERM), set(threading.enumerate())
    train(make_settings(steps=2))
    assert signal.getsignal(signal.SIGTERM) is handler
    for thread in threading.enumerate():
        if thread.name.startswith("logitstore-stream"):
            thread.join(timeout=10)
    # Threads of earlier tests may end meanwhile; tqdm, which transformers shows progress with, keeps one for good.
    assert [t.name for t in set(threading.enumerate()) - threads if t.name != "tqdm_monitor"] == []
