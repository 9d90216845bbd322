"""`logitstore benchmark capture`: captures from text to committed shards, beside the bare forward pass."""

from __future__ import annotations

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tools.benchmark.arguments import check_multiple
from tools.benchmark.tables import print_heading, print_table, print_text

_LONG_DOCUMENTS = (1, 8)  # times the positions of a unit


class MethodChoice(StrEnum):
    """What is kept, with the default settings of each."""

    top_k = "top_k"
    sample = "sample"
    head_tail = "head_tail"


def capture(
    vocab_size: Annotated[int, typer.Option(min=1000, help="V, size of the vocabulary.")] = 32_000,
    hidden_size: Annotated[int, typer.Option(min=64, help="D, a multiple of 64.")] = 512,
    layers: Annotated[int, typer.Option(min=1, help="Of the teacher.")] = 6,
    method: Annotated[list[MethodChoice] | None, typer.Option(help="Default all.")] = None,
    length: Annotated[int, typer.Option(min=16, help="T, positions of a sequence.")] = 1024,
    positions: Annotated[int, typer.Option(min=16, help="Of a unit, one repetition.")] = 16_384,
    batch_tokens: Annotated[int, typer.Option(min=16, help="Tokens of a forward pass.")] = 4096,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repetitions of each, in turns.")] = 5,
) -> None:
    """Capture units with a transformers teacher of random weights, and run its forward pass alone on the same batches.

    The bare pass computes the logits of every position and throws them away. The default teacher has 50 million
    parameters, 33 million of them in embeddings and head. OMP_NUM_THREADS chooses the number of threads.

    \b
    Example:
      logitstore benchmark capture --method top_k --repeats 3
    """
    import torch

    from tools.benchmark.capture_units import CaptureCase, measure_capture, measure_peak

    chosen = method or list(MethodChoice)
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
        f"logitstore benchmark capture --vocab-size {vocab_size} --hidden-size {hidden_size} --layers {layers} "
        f"--length {length} --positions {positions} --batch-tokens {batch_tokens} --repeats {repeats}",
        "torch",
        "transformers",
    )
    with tempfile.TemporaryDirectory() as folder:
        figures = measure_capture(case, [str(one) for one in chosen], repeats, Path(folder))
        peaks = {
            num_words: measure_peak(case, str(chosen[0]), num_words, Path(folder) / f"words-{num_words}")
            for num_words in (factor * case.positions for factor in _LONG_DOCUMENTS)
        }
    print_text(
        f"Units of {figures.positions:,} positions, {torch.get_num_threads()} threads, float32, {figures.parameters:,} "
        "parameters. Capture: JSON lines in, tokenized, scored, sparsified,\nencoded, checked, written, digested and "
        "committed to a local disk. ±: half the spread, in percent."
    )
    bare = figures.bare.median
    rows: list[list[object]] = [
        ["bare forward pass", f"{figures.positions / bare:,.0f}", f"{50 * figures.bare.spread:.0f}%", "–", "–"]
    ]
    for name, timing in figures.captures.items():
        seconds = timing.median
        rows.append(
            [
                f"capture, {name}",
                f"{figures.positions / seconds:,.0f}",
                f"{50 * timing.spread:.0f}%",
                f"{bare / seconds:.2f}",
                f"{figures.bytes_per_position[name]:.1f}",
            ]
        )
    print_table(["", "positions per second", "±", "of the bare pass", "bytes per position"], rows)
    listed = ", ".join(f"of {num_words:,} tokens {peak / 2**20:,.0f} MiB" for num_words, peak in peaks.items())
    print_text(f"{chosen[0]}, most memory beside the loaded teacher, for a single document {listed}.")
