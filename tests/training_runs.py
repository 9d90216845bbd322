"""Whole runs: stopped in the middle, or of several processes, and what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from checkout import ROOT
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import AutoModelForCausalLM

from trainer.config import TrainSettings
from trainer.loop import TrainReport, train
from trainer.progress import StepResult

# Trains, and asks rank STOP_RANK alone to stop after STOP_STEP. Fails if a wrapped student is still there when the
# process group goes: freed later, it sometimes hung.
SCRIPT = """
import faulthandler, gc, os, signal, sys
faulthandler.dump_traceback_later(90, exit=True)  # a hang shows where
import torch.distributed
from torch.nn.parallel import DistributedDataParallel
from logitstore.settings import read_settings
from trainer.config import TrainSettings
from trainer.loop import train

def stop(result):
    if os.environ.get("STOP_STEP") == str(result.step) and os.environ.get("RANK", "0") == os.environ["STOP_RANK"]:
        signal.raise_signal(signal.SIGTERM)

destroy = torch.distributed.destroy_process_group

def check_and_destroy():
    assert not any(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects())
    destroy()

torch.distributed.destroy_process_group = check_and_destroy
report = train(read_settings(TrainSettings, sys.argv[1]), on_step=stop)
print("steps", report.steps, "interrupted", report.interrupted)
"""


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint by name, whole."""
    reader = FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def train_until(settings: TrainSettings, stop_step: int) -> TrainReport:
    """Train, and have SIGTERM sent to this process in the middle of the run."""

    def stop(result: StepResult) -> None:
        if result.step == stop_step:
            signal.raise_signal(signal.SIGTERM)

    return train(settings, on_step=stop)


def run_processes(settings: TrainSettings, folder: Path, world_size: int, *, stop_step: int | None = None) -> str:
    """Train with a number of processes and return what they printed."""
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    (folder / "train.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
    return launch(
        world_size,
        [folder / "script.py", folder / "train.yaml"],
        {"STOP_STEP": str(stop_step), "STOP_RANK": str(world_size - 1)},
    )


def make_runs(runs: list[dict[str, Any]], folder: Path, world_size: int) -> None:
    """Make several runs one after another with a number of processes, which are started once.

    Args:
        runs: each with `settings`, and perhaps what is to befall it; see `runs_of_ranks`.
        folder: of the list of runs, and of what the processes log.
        world_size: how many processes.
    """
    values = [{**run, "settings": run["settings"].model_dump(mode="json")} for run in runs]
    (folder / "runs.json").write_text(json.dumps(values), encoding="utf-8")
    launch(world_size, [ROOT / "tests/runs_of_ranks.py", folder / "runs.json"], {})


def launch(world_size: int, arguments: list[Path], environment: dict[str, str]) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    done = subprocess.run(
        [*launcher, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def read_global_batches(output: Path) -> dict[int, list[str]]:
    """Addresses of every step's global batch, in the order of ranks."""
    batches: dict[int, list[str]] = {}
    for path in sorted(output.glob("records-rank*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            batches.setdefault(values["step"], []).extend(values["records"])
    return batches
