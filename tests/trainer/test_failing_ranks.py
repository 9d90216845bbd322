"""What befalls one rank alone: no other waits for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from checkout import ROOT
from training_runs import launch, train_until

from logitstore.errors import ConfigError, OutsideError, TrainingError
from trainer.config import TrainSettings
from trainer.distributed import Processes
from trainer.sweep.settings import read_sweep

ALONE = Processes(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.mark.slow
def test_ranks_fail_together_where_one_alone_can_not_go_on(
    make_settings: Callable[..., TrainSettings], tmp_path: Path
) -> None:
    """A sweep's run with a checkpoint that one cannot read, a student that is spread already, a full disk."""
    settings = make_settings(steps=2, held_out=None, output=tmp_path / "sweep")
    values = settings.model_dump(mode="json", exclude_defaults=True)
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**values, "runs": [{"name": "bad"}, {"name": "good"}]}), encoding="utf-8")
    assert train_until(read_sweep(path).runs[0].settings, 1).interrupted
    launch(2, [ROOT / "tests/failing_ranks.py", path], {})
    for rank in range(2):
        bad, good = json.loads((tmp_path / f"runs-rank{rank}.json").read_text(encoding="utf-8"))
        assert bad[:2] == ["bad", "failed"]
        assert "that this rank can read" in bad[2]
        assert good == ["good", "finished", None]


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (ConfigError("seed: wrong"), ConfigError, "^seed: wrong$"),
        (
            torch.OutOfMemoryError("tried 3 GiB"),
            TrainingError,
            "run/a: expected room in the memory of cpu, found tried",
        ),
        (OSError(28, "No space left on device"), OutsideError, "run/a: expected files .* No space left"),
    ],
)
def test_failure_of_memory_or_disk_says_where_and_what_to_do(
    raised: Exception, expected: type[Exception], message: str
) -> None:
    with pytest.raises(expected, match=message), ALONE.fail_together("run/a"):
        raise raised
