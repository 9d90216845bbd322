"""The quickstart's two students, trained side by side by the same command that a user types."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from logitstore.errors import TrainingError
from tools.curves import read_curves, read_metrics
from tools.student_results import StudentResult
from trainer.evaluate import Evaluation

_SECONDS_BETWEEN_LOOKS = 0.5


def train_students(settings_files: dict[str, Path], outputs: dict[str, Path], console: Console) -> list[StudentResult]:
    """Run `logitstore train` for every student at once, with an equal share of the CPUs each.

    Args:
        settings_files: name of the student to its settings.
        outputs: name of the student to its output folder.
        console: where progress is shown.
    Raises:
        TrainingError: a student's process failed; carries what it said.
        KeyboardInterrupt: a student was asked to stop; the same call goes on from its checkpoint.
    """
    threads = max(1, (os.cpu_count() or 1) // len(settings_files))
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        errors = {name: stack.enter_context(tempfile.TemporaryFile("w+")) for name in settings_files}
        processes = {
            name: stack.enter_context(_start(path, threads, errors[name])) for name, path in settings_files.items()
        }
        status = stack.enter_context(console.status("  starting"))
        while any(process.poll() is None for process in processes.values()):
            status.update("  " + "   ".join(_describe(name, outputs[name]) for name in processes))
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        reports = {name: _read_report(name, process, errors[name]) for name, process in processes.items()}
    seconds = time.monotonic() - started
    for name, report in reports.items():
        console.print(f"  {name:10} {report['steps']} steps, {report['positions']:,} positions", highlight=False)
    console.print(f"  both in {seconds:.0f} s, {threads} CPU thread{'s' * (threads > 1)} each", highlight=False)
    return [
        StudentResult(
            name=name,
            evaluation=Evaluation.from_json(report["evaluation"]),
            curves=read_curves(outputs[name] / "metrics.jsonl"),
        )
        for name, report in reports.items()
    ]


@contextlib.contextmanager
def _start(settings_file: Path, threads: int, errors: IO[str]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tools.train", str(settings_file), "--json", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        yield process
    finally:
        process.terminate()  # it saves a checkpoint and ends; one that has ended does not mind
        process.wait()


def _read_report(name: str, process: subprocess.Popen[str], errors: IO[str]) -> dict[str, Any]:
    assert process.stdout is not None
    output = process.stdout.read()
    if process.returncode == 0:
        report: dict[str, Any] = json.loads(output)
        return report
    if process.returncode == 4 and json.loads(output or "{}").get("interrupted"):
        raise KeyboardInterrupt
    errors.seek(0)
    raise TrainingError(f"student {name!r}: training ended with exit code {process.returncode}:\n{errors.read()}")


def _describe(name: str, output: Path) -> str:
    lines = read_metrics(output / "metrics.jsonl")
    last = next((line for line in reversed(lines) if "train/cross_entropy" in line), None)
    if last is None:
        return f"{name}: starting"
    return f"{name}: step {last['step']}, loss {last['train/cross_entropy']:.3f}, KL {last['train/bucket_kl']:.3f}"
