"""`logitstore benchmark train`: a student's steps with a teacher's store, beside plain steps on the same tokens."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.benchmark.arguments import check_device, check_loss
from tools.benchmark.tables import print_heading, print_table, print_text, tell_step

if TYPE_CHECKING:
    from tools.benchmark.train_steps import Case, Measured, Take

_PLAIN = ("plain, all logits", "plain, chunked")
_BOTH, _SMALL = "both in one sweep", "the smaller one alone"
STEP_HEADER = ["tokens/s", "±", "to the faster plain step", "±", "waits for data", "first batch, s"]


class Precision(StrEnum):
    """Of the student's forward pass."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Part(StrEnum):
    """What is measured."""

    step = "step"
    sweep = "sweep"


def train(
    part: Annotated[
        list[Part] | None, typer.Option(help="What to measure; may be given again. All by default.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(min=100, help="V, size of the vocabulary.")] = 32_000,
    top_k: Annotated[int, typer.Option(min=1, help="Slots of a position.")] = 64,
    length: Annotated[int, typer.Option(min=8, max=1024, help="T, positions of a sequence.")] = 512,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 4,
    micro_batch: Annotated[int, typer.Option(min=1, help="Sequences of a forward and backward pass.")] = 2,
    hidden_size: Annotated[int, typer.Option(min=16, help="D of the student, a Llama with tied embeddings.")] = 384,
    layers: Annotated[int, typer.Option(min=2, help="Of the student; a second one of a sweep has half of them.")] = 7,
    loss: Annotated[str, typer.Option(help="Kind of the distillation term.")] = "bucket_kl",
    precision: Annotated[Precision, typer.Option(help="bfloat16 is autocast.")] = Precision.float32,
    device: Annotated[str | None, typer.Option(help="Device of torch; a GPU where there is one otherwise.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of a repetition.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repetitions of each, in turns.")] = 3,
) -> None:
    """Train one student from a store on a local disk, and as a plain language model on the same tokens in memory.

    Each repetition begins with fresh weights and a step that does not count. What is compared makes a step in turn, so
    that a machine that drifts does so for all; it is in memory at once, three or four students, with the sweep three
    more. The plain steps have the same student, optimizer, clipping and micro-batches, and cross-entropy over all
    logits or in the chunks of the fused loss. OMP_NUM_THREADS chooses the number of threads.

    \b
    Example:
      logitstore benchmark train --hidden-size 512 --layers 12
    """
    from tools.benchmark.train_steps import Case, write_train_store

    check_loss(loss)
    check_device(device)
    parts = part or list(Part)
    print_heading(
        " ".join(
            [
                f"logitstore benchmark train --vocab-size {vocab_size} --top-k {top_k} --length {length}",
                f"--sequences {sequences} --micro-batch {micro_batch} --hidden-size {hidden_size} --layers {layers}",
                f"--loss {loss} --precision {precision} --steps {steps} --repeats {repeats}",
                *(f"--part {name}" for name in part or ()),
            ]
        ),
        "torch",
        "transformers",
    )
    with tempfile.TemporaryDirectory(prefix="logitstore-train-store-") as folder:
        store = write_train_store(
            Path(folder), num_records=steps * sequences, length=length, top_k=top_k, vocab_size=vocab_size
        )
        case = Case(
            store=store,
            vocab_size=vocab_size,
            length=length,
            sequences=sequences,
            micro_batch_sequences=micro_batch,
            hidden_size=hidden_size,
            layers=layers,
            steps=steps,
            loss=loss,
            precision=precision,
            device=device,
        )
        found = measure_in_turns(build_alternatives(case, parts), steps, repeats)
    print_found(case, parts, found)


def build_alternatives(case: Case, parts: list[Part]) -> dict[str, Callable[[], AbstractContextManager[Take]]]:
    """What is run in turns, by name of the row."""
    from tools.benchmark.train_steps import opened_distillation, opened_plain, opened_side_by_side
    from trainer.distributed import choose_device

    small = replace(case, layers=case.layers // 2)
    alternatives: dict[str, Callable[[], AbstractContextManager[Take]]] = {
        name_row(case.loss): lambda: opened_distillation(case)
    }
    if Part.step in parts:
        dense, chunked = _PLAIN
        alternatives[dense] = lambda: opened_plain(case, is_chunked=False)
        if choose_device(case.device).type == "cpu":
            alternatives[chunked] = lambda: opened_plain(case, is_chunked=True)
        alternatives[name_row("cross_entropy")] = lambda: opened_distillation(case, "cross_entropy")
    if Part.sweep in parts:
        alternatives[_SMALL] = lambda: opened_distillation(small)
        alternatives[_BOTH] = lambda: opened_side_by_side([case, small])
    return alternatives


def name_row(loss: str) -> str:
    """What a row of `logitstore train` is called."""
    return f"logitstore train, {loss}"


def measure_in_turns(
    alternatives: Mapping[str, Callable[[], AbstractContextManager[Take]]], steps: int, repeats: int
) -> dict[str, list[Measured]]:
    """The steps of every alternative, by name: each makes one in every turn, and each turn begins with another one."""
    found: dict[str, list[Measured]] = {name: [] for name in alternatives}
    names = list(alternatives)
    for repeat in range(repeats):
        tell_step(f"repetition {repeat + 1} of {repeats}")
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stderr(None))  # transformers' bars
            takes = {name: stack.enter_context(opened()) for name, opened in alternatives.items()}
            for step in range(steps):
                first = (repeat * steps + step) % len(names)
                for name in names[first:] + names[:first]:
                    found[name].append(takes[name]())
    return found


def print_found(case: Case, parts: list[Part], found: Mapping[str, list[Measured]]) -> None:
    """The tables of what was measured."""
    import torch

    from tools.benchmark.train_steps import count_parameters

    print_text(
        f"{len(next(iter(found.values())))} steps of {case.sequences} sequences of {case.length} positions in "
        f"micro-batches of {case.micro_batch_sequences}, {torch.get_num_threads()} threads. The clock starts with the "
        "first batch.\nAlternatives make a step in turn; ratios are medians of those of the turns. ±: half "
        "the distance of the quartiles, in percent of the median."
    )
    parameters = count_parameters(case) / 1e6
    if Part.step in parts:
        plain = min((found[name] for name in _PLAIN if name in found), key=_find_median)
        names = [name for name in found if name not in (_SMALL, _BOTH)]
        rows = [build_step_row(name, found[name], case.positions, plain) for name in names]
        print_table([f"student of {parameters:,.1f} million parameters", *STEP_HEADER], rows)
    if Part.sweep in parts:
        small = count_parameters(replace(case, layers=case.layers // 2)) / 1e6
        header = [f"students of {parameters:,.1f} and {small:,.1f} million parameters", "s per step of both", "±"]
        print_table([*header, "to one after the other", "±"], build_sweep_rows(found, name_row(case.loss)))


def build_step_row(name: str, found: list[Measured], positions: int, plain: list[Measured]) -> list[object]:
    """A row of the table of steps, beside the plain ones of the same turns."""
    median, spread = _summarize([run.seconds for run in found])
    ratio, ratio_spread = _summarize([other.seconds / run.seconds for run, other in zip(found, plain, strict=True)])
    if name in _PLAIN:
        waits, first = "–", "–"
    else:
        waits = f"{100 * sum(run.wait_seconds for run in found) / sum(run.seconds for run in found):.2f}%"
        first = f"{statistics.median(run.first_seconds for run in found if run.first_seconds):.2f}"
    return [name, f"{positions / median:,.0f}", spread, f"{ratio:.3f}", ratio_spread, waits, first]


def build_sweep_rows(found: Mapping[str, list[Measured]], large: str) -> list[list[object]]:
    """Rows of the table of a sweep: two students one after the other, and in lock-step."""
    alone = [one.seconds + other.seconds for one, other in zip(found[large], found[_SMALL], strict=True)]
    together = [run.seconds for run in found[_BOTH]]
    expected, expected_spread = _summarize(alone)
    median, spread = _summarize(together)
    ratio, ratio_spread = _summarize([one / other for one, other in zip(together, alone, strict=True)])
    return [
        ["one after the other", f"{expected:.3f}", expected_spread, "–", "–"],
        [_BOTH, f"{median:.3f}", spread, f"{ratio:.3f}", ratio_spread],
    ]


def _find_median(found: list[Measured]) -> float:
    return statistics.median(run.seconds for run in found)


def _summarize(values: list[float]) -> tuple[float, str]:
    """Median and half the distance of the quartiles, as it is printed: of many single steps some are always hit."""
    median = statistics.median(values)
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    return median, f"{50 * (upper - lower) / median:.1f}%"
