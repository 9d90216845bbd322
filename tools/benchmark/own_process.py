"""Measurements in processes of their own: what one step allocates is not found in the next one's memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run of a step in a process of its own."""

    seconds: float
    processor_seconds: float
    peak_bytes: int
    outcome: str


def measure_apart(module: str, step: str, *arguments: object) -> Measured:
    """Run `python -m MODULE STEP ARGUMENTS`, whose last line is what `print_measured` prints."""
    command = [sys.executable, "-m", module, step, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def print_measured(measure: Callable[[], str]) -> None:
    """Run what is to be measured, and print one JSON object: times, peak memory of this process, and its outcome."""
    start, start_processor = time.perf_counter(), time.process_time()
    outcome = measure()
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - start_processor
    measured = {"seconds": seconds, "processor_seconds": processor_seconds, "peak_bytes": _read_peak_bytes()}
    # Where a step has connected to Ray, that has turned stdout away for what it prints itself.
    print(json.dumps(measured | {"outcome": outcome}), file=sys.__stdout__, flush=True)


def _read_peak_bytes() -> int:
    """Peak resident memory of this program; what the process was before it became this program does not count."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
