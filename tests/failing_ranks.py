"""What befalls one of two ranks alone, and what both make of it; run by torchrun as a script.

Argument: a sweep file with the runs `bad`, of which there is a checkpoint that the last rank cannot read, and `good`.
Every rank leaves the outcomes of the sweep beside the file.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
from pathlib import Path

import pytest
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

import trainer.run
from logitstore.errors import ConfigError, OutsideError, TrainingError
from trainer.checkpoint import CheckpointHeader, read_header, save_checkpoint
from trainer.config import TrainSettings
from trainer.distributed import Processes, join_processes
from trainer.optimizer import Optimizers
from trainer.optimizer_config import OptimizerSettings
from trainer.run import prepare_run
from trainer.sweep.settings import Sweep, read_sweep
from trainer.sweep.training import train_sweep


def lose_checkpoint(path: Path) -> CheckpointHeader:
    """Read the header of a checkpoint, unless this is the last rank."""
    if os.environ["RANK"] == "1":
        raise TrainingError(f"{path}: expected a checkpoint, found none that this rank can read")
    return read_header(path)


def sweep_with_a_checkpoint_that_one_rank_cannot_read(sweep: Sweep, folder: Path) -> None:
    trainer.run.read_header = lose_checkpoint
    report = train_sweep(sweep)
    trainer.run.read_header = read_header
    runs = [(run.name, run.status, run.error) for run in report.runs]
    (folder / f"runs-rank{os.environ['RANK']}.json").write_text(json.dumps(runs), encoding="utf-8")


def fail_after_the_student_is_spread(settings: TrainSettings, processes: Processes) -> None:
    """What wraps it has to be gone while the error is still on its way through whoever leaves the process group."""

    build = trainer.run.build_optimizer

    def refuse(student: PreTrainedModel, chosen: OptimizerSettings) -> Optimizers:
        if processes.rank == 1:
            raise ConfigError("optimizer: expected a library that this rank has")
        return build(student, chosen)

    for parallel in ("ddp", "fsdp"):
        changed = settings.model_copy(update={"parallel": parallel, "output": f"{settings.output}-{parallel}"})
        trainer.run.build_optimizer = refuse
        with pytest.raises(ConfigError, match="library that this rank has") as raised:
            prepare_run(changed, processes)
        assert raised.tb is not None  # the error is still there
        assert not [thing for thing in gc.get_objects() if isinstance(thing, FSDPModule | DistributedDataParallel)]
    trainer.run.build_optimizer = build


def fail_to_write_on_one_rank(settings: TrainSettings, processes: Processes, folder: Path) -> None:
    """The first rank alone makes folders, and finds a file in its way."""
    run = prepare_run(settings.model_copy(update={"output": f"{settings.output}-unwritten"}), processes)
    (folder / f"in the way of {processes.rank}").touch()
    header = CheckpointHeader(step=1, positions=1, manifest_number=1, stream={}, identity={})
    with pytest.raises(OutsideError, match="in the way of 0"):
        save_checkpoint(folder / "in the way of 0", header, run.student, run.optimizer.members, processes, keep=1)
    run.let_go()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(60, exit=True)  # a hang shows where
    path = Path(sys.argv[1])
    sweep = read_sweep(path)
    with join_processes("cpu") as processes:
        sweep_with_a_checkpoint_that_one_rank_cannot_read(sweep, path.parent)
        fail_after_the_student_is_spread(sweep.runs[0].settings, processes)
        fail_to_write_on_one_rank(sweep.runs[0].settings, processes, path.parent)
