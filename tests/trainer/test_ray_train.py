"""The loop in the workers of Ray Train, which brings its own process group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT
from training_runs import read_weights

from logitstore.store.logit_store import LogitStore
from trainer.config import TrainSettings
from trainer.loop import train

MakeSettings = Callable[..., TrainSettings]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_two_workers_of_ray_train_make_the_student_that_one_process_makes(
    make_settings: MakeSettings, taught_store: LogitStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from cluster.connection import connect

    settings = make_settings(global_batch_sequences=10, steps=4, checkpoint_every=2)
    alone = train(settings.model_copy(update={"output": str(tmp_path / "alone")}))
    together = settings.model_copy(update={"output": str(tmp_path / "together")})

    def teach(values: dict[str, Any]) -> None:
        train(TrainSettings.model_validate(values))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the workers
    with connect(None, num_cpus=2):
        TorchTrainer(
            teach,
            train_loop_config=together.model_dump(mode="json"),
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=str(tmp_path / "ray"), name="student"),
        ).fit()
    assert alone.student is not None
    one, two = (read_weights(folder) for folder in (alone.student, tmp_path / "together/student"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-4, msg=name)
