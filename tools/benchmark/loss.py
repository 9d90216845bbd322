"""`logitstore benchmark loss`: time and memory of the fused loss beside cross-entropy and the losses of others."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from tools.benchmark.peak_memory import forget_peak, read_peak_bytes
from tools.benchmark.tables import print_heading, print_table, print_text, tell_step

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from tools.benchmark.loss_methods import Case

_WARM_UP_VOCAB_SIZE, _WARM_UP_POSITIONS = 2000, 16
_GROWTH = (4, 8)  # times the positions, to see what grows with them: by then there are several tiles


class Precision(StrEnum):
    """Of hidden states and head."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One pass in a process of its own; peak over what was resident before it."""

    seconds: float
    extra_bytes: int


def loss(
    vocab_size: Annotated[list[int] | None, typer.Option(help="V; default 32,000 and 151,936.")] = None,
    hidden_size: Annotated[list[int] | None, typer.Option(help="D; default 896 and 2048.")] = None,
    precision: Annotated[list[Precision] | None, typer.Option(help="Default both.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only these rows.")] = None,
    positions: Annotated[int, typer.Option(min=16, help="N, positions of a batch.")] = 512,
    repeats: Annotated[
        int, typer.Option(min=1, help="Timed repetitions of each, in turns; a process for every one.")
    ] = 3,
) -> None:
    """Run one forward and backward pass over a head, by every method, each in a process of its own.

    What is not installed (trl, liger-kernel) is said to be so. OMP_NUM_THREADS chooses the number of threads.

    \b
    Example:
      logitstore benchmark loss --vocab-size 32000 --hidden-size 896
    """
    import torch

    from logitstore.errors import ConfigError
    from tools.benchmark.loss_methods import METHODS, SUPPORT_SIZE, Case

    if unknown := set(method or ()) - METHODS.keys():
        raise ConfigError(f"--method: expected some of {', '.join(METHODS)}, found {', '.join(sorted(unknown))}")
    print_heading(
        f"logitstore benchmark loss --positions {positions} --repeats {repeats}",
        "torch",
        "trl",
        "liger-kernel",
    )
    print_text(
        f"Forward and backward over {positions} positions, K = {SUPPORT_SIZE}, {torch.get_num_threads()} threads. "
        "Extra memory: peak of the process over what was\nresident before the pass (hidden states, head, supports; for "
        "the dense methods the teacher's logits), so the\ngradient of the head is in it. ±: half the spread, in "
        "percent. Ratios: ours over the row's."
    )
    vocab_sizes = sorted(vocab_size or (32_000, 151_936))
    for V in vocab_sizes:
        for D in hidden_size or (896, 2048):
            for chosen in precision or tuple(Precision):
                case = Case(vocab_size=V, hidden_size=D, positions=positions, dtype=getattr(torch, chosen))
                _print_case(case, method or list(METHODS), repeats)
                if vocab_sizes[0] == V and "ours" in (method or METHODS):
                    _print_growth(case)


def _print_case(case: Case, methods: list[str], repeats: int) -> None:

    runs: dict[str, list[Measured | None]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name in methods:
            if None not in runs[name]:
                tell_step(f"V = {case.vocab_size}, D = {case.hidden_size}, {case.dtype}: {name}")
                runs[name].append(measure(name, case))
    ours = [run for run in runs.get("ours", []) if run is not None]
    label = f"V = {case.vocab_size:,}, D = {case.hidden_size}, {str(case.dtype).removeprefix('torch.')}"
    rows = [build_row(name, [run for run in found if run is not None], ours) for name, found in runs.items()]
    print_table([label, "seconds", "±", "time: ours / it", "extra MiB", "memory: ours / it"], rows)


def build_row(name: str, found: list[Measured], ours: list[Measured]) -> list[object]:
    """A row of the table; `ours` are the repetitions that the row's are compared to."""
    if not found:
        return [name, "not installed", *["–"] * 4]
    seconds = [run.seconds for run in found]
    median, extra = statistics.median(seconds), statistics.median(run.extra_bytes for run in found)
    time_ratio, memory_ratio = "–", "–"
    if ours and name != "ours":
        time_ratio = f"{statistics.median(run.seconds for run in ours) / median:.2f}"
        memory_ratio = f"{statistics.median(run.extra_bytes for run in ours) / extra:.2f}"
    spread = 50 * (max(seconds) - min(seconds)) / median
    return [name, f"{median:.2f}", f"{spread:.0f}%", time_ratio, f"{extra / 2**20:,.0f}", memory_ratio]


def _print_growth(case: Case) -> None:
    """What a further position costs, beside the gradient of its hidden state, which any loss hands back."""
    from tools.benchmark.loss_methods import SUPPORT_SIZE

    few, many = (factor * case.positions for factor in _GROWTH)
    extra = [measure("ours", replace(case, positions=positions)) for positions in (few, many)]
    assert extra[0] is not None  # ours is always installed
    assert extra[1] is not None
    per_position = (extra[1].extra_bytes - extra[0].extra_bytes) / (many - few)
    hidden = case.hidden_size * case.dtype.itemsize
    print_text(
        f"From {few:,} to {many:,} positions ours takes {per_position:,.0f} bytes more per position: the gradient of a "
        f"hidden state is {hidden:,}, a support {SUPPORT_SIZE * 12:,}."
    )


def measure(method: str, case: Case) -> Measured | None:
    """Run a method once in a process of its own; None where its package is not installed.

    Raises:
        RuntimeError: the process ended without an answer.
    """
    context = multiprocessing.get_context("forkserver")
    # The imports of all, once: processes start from a server that has made them, and has computed nothing.
    context.set_forkserver_preload(["torch", "trl.experimental.gkd", "liger_kernel.chunked_loss"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(sender, method, case))
    process.start()
    sender.close()
    try:
        found: Measured | None = receiver.recv()
    except EOFError as error:
        process.join()
        raise RuntimeError(f"{method}: the process ended with {process.exitcode}; is there enough memory?") from error
    process.join()
    return found


def answer(sender: Connection, method: str, case: Case) -> None:
    """Run a method once and send what was measured, or None where its package is not installed."""
    from tools.benchmark.loss_methods import METHODS

    prepare = METHODS[method]
    try:
        # Everything is loaded and every thread started before the clock runs.
        prepare(replace(case, vocab_size=_WARM_UP_VOCAB_SIZE, positions=_WARM_UP_POSITIONS))()
    except ModuleNotFoundError:
        sender.send(None)
        return
    run = prepare(case)
    before = forget_peak()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    sender.send(Measured(seconds=seconds, extra_bytes=read_peak_bytes() - before))
