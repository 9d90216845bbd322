"""`logitstore benchmark method-cost`: what it takes to cut logits to supports, by every capture method."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from tools.benchmark.arguments import check_device
from tools.benchmark.tables import print_heading, print_table, print_text

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from logitstore.teacher.protocol import Method
    from tools.benchmark.timing import Timing

YARDSTICK = "top_k, k = 64"


@dataclass(frozen=True, kw_only=True)
class CostCase:
    """What is measured: so many positions of a vocabulary, and heads of these hidden sizes to compare with."""

    vocab_size: int
    hidden_sizes: tuple[int, ...]
    positions: int
    device: str


def method_cost(
    vocab_size: Annotated[list[int] | None, typer.Option(help="V; default 32,000 and 128,256.")] = None,
    hidden_size: Annotated[list[int] | None, typer.Option(help="D of the heads; default 1024 and 4096.")] = None,
    positions: Annotated[int, typer.Option(min=1, help="At once.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repetitions of each, in turns.")] = 7,
    device: Annotated[str, typer.Option(help="Device of torch: cpu or cuda.")] = "cpu",
) -> None:
    """Cut the same logits to supports by top_k, sample and head_tail, beside the head that makes logits.

    All of what a teacher keeps is in it: support, tail, entropy and the next token. OMP_NUM_THREADS chooses the number
    of threads.

    \b
    Example:
      logitstore benchmark method-cost --vocab-size 32000
    """
    import torch

    check_device(device)
    print_heading(f"logitstore benchmark method-cost --positions {positions} --repeats {repeats}", "torch")
    print_text(
        f"{positions} positions of float32 logits on {device}, {torch.get_num_threads()} threads. ±: half the spread, "
        "in percent. Ratios: the row's time over\nthat of top_k, and over that of the product of hidden states and "
        "head that makes such logits."
    )
    for V in sorted(vocab_size or (32_000, 128_256)):
        sizes = tuple(sorted(hidden_size or (1024, 4096)))
        case = CostCase(vocab_size=V, hidden_sizes=sizes, positions=positions, device=device)
        header = [f"V = {V:,}", "us per position", "±", "of top_k", *(f"of a head, D = {D:,}" for D in sizes)]
        print_table(header, build_rows(case, measure(case, repeats)))


def build_rows(case: CostCase, timings: dict[str, Timing]) -> list[list[object]]:
    """Rows of the table, in the order of the timings; heads are compared to top_k only."""
    rows: list[list[object]] = []
    heads = [_name_head(D) for D in case.hidden_sizes]
    for name, timing in timings.items():
        ratios = ["–" if name in heads else f"{timing.median / timings[head].median:.3f}" for head in heads]
        relative = f"{timing.median / timings[YARDSTICK].median:.2f}"
        time = f"{1e6 * timing.median / case.positions:,.0f}"
        rows.append([name, time, f"{50 * timing.spread:.0f}%", relative, *ratios])
    return rows


def measure(case: CostCase, repeats: int) -> dict[str, Timing]:
    """Seconds of every method and every head over all positions, in turns."""
    import torch

    from logitstore.teacher.protocol import HeadTailMethod, SampleMethod, TopKMethod
    from tools.benchmark.timing import time_in_turns

    generator = torch.Generator().manual_seed(0)
    logits = draw_logits(case, generator)
    methods: dict[str, Method] = {
        YARDSTICK: TopKMethod(k=64),
        "sample, 50 draws": SampleMethod(num_draws=50),
        "head_tail, threshold 1/28": HeadTailMethod(threshold=1 / 28),
    }
    runs = {name: _build_run(logits, method) for name, method in methods.items()}
    for D in case.hidden_sizes:
        hidden, weight = (
            torch.randn(count, D, generator=generator).to(case.device) for count in (case.positions, case.vocab_size)
        )
        runs[_name_head(D)] = _wait_for_device(logits, partial(torch.matmul, hidden, weight.t()))
    return time_in_turns(runs, repeats)


def draw_logits(case: CostCase, generator: torch.Generator) -> torch.Tensor:
    """[positions, V] float32: a Zipf distribution over ids in any order, and noise of two nats and a half."""
    import torch

    ranks = torch.randperm(case.vocab_size, generator=generator) + 1
    noise = torch.randn(case.positions, case.vocab_size, generator=generator) * 2.5
    return (noise - ranks.log()).to(case.device)


def _build_run(logits: torch.Tensor, method: Method) -> Callable[[], object]:
    """What the transformers teacher does with logits: on a CPU in parts that stay in the cache."""
    import torch

    from logitstore.teacher.draws import DrawKeys
    from logitstore.teacher.huggingface import NUM_LOGITS_AT_ONCE
    from logitstore.teacher.sparsify import Scratch, sparsify

    scratch = Scratch()
    randomness = DrawKeys.build([1], [len(logits)], logits.device)
    next_ids = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    size = max(1, NUM_LOGITS_AT_ONCE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)

    def run() -> None:
        for start in range(0, len(logits), size):
            rows = slice(start, start + size)
            sparsify(logits[rows], next_ids[rows], method, randomness[rows], scratch=scratch)

    return _wait_for_device(logits, run)


def _wait_for_device(logits: torch.Tensor, run: Callable[[], object]) -> Callable[[], object]:
    import torch

    @torch.inference_mode()
    def run_and_wait() -> None:
        run()
        if logits.device.type == "cuda":
            torch.cuda.synchronize()

    return run_and_wait


def _name_head(hidden_size: int) -> str:
    return f"head, D = {hidden_size:,}"
