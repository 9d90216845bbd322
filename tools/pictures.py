"""The pictures of docs/concepts.md, drawn from the code that they are about.

`python -m tools.pictures docs` writes them; they need the extras `teacher` and `plot`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from transformers import AutoModelForCausalLM

from logitstore.stream.order import StreamOrder
from logitstore.teacher.draws import DrawKeys
from logitstore.teacher.protocol import HeadTailMethod, TopKMethod
from logitstore.teacher.sparsify import SparseRows, sparsify
from logitstore.teacher.tokenizer import TeacherTokenizer, load_tokenizer
from tools.quickstart import TEACHER

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KEPT, _REST, _NEXT = "#0072b2", "#d55e00", "#009e73"  # of Okabe and Ito, who chose them for all eyes
_TEXT, _NEXT_TEXT = "import os\n\ndef read(path):\n    with open(path) as file:\n        return", " file"
_K = 12
_THRESHOLD = 1 / 28
ROW_GROUPS, RECORDS, BATCH, LANES = 24, 32, 32, 4


def draw_position(file: Path) -> None:
    """One position of the shipped teacher: all its ids, and what `top_k` and `head_tail` keep of them."""
    tokenizer = load_tokenizer(str(TEACHER))
    token_ids, [next_id] = tokenizer.encode([_TEXT])[0], tokenizer.encode([_NEXT_TEXT])[0]
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([token_ids])).logits[0, -1:, : tokenizer.vocab_size]
    next_ids = torch.tensor([next_id])
    top = sparsify(logits, next_ids, TopKMethod(k=_K))
    drawn = sparsify(logits, next_ids, HeadTailMethod(threshold=_THRESHOLD), DrawKeys.build([7], [1], device="cpu"))
    probabilities = logits[0].double().softmax(-1).numpy()
    order = np.argsort(-probabilities, kind="stable")

    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    _draw_candidates(left, tokenizer, top, next_id)
    _draw_all(right, probabilities[order], np.argsort(order), drawn)
    _save(figure, file)


def _draw_candidates(axes: Axes, tokenizer: TeacherTokenizer, rows: SparseRows, next_id: int) -> None:
    ids, masses = rows.ids[0].tolist(), rows.logprobs[0].exp().tolist()
    names = [_show(tokenizer.decode([token])) for token in ids] + [f"the other {tokenizer.vocab_size - _K:,}"]
    colours = [_NEXT if token == next_id else _KEPT for token in ids] + [_REST]
    bars = axes.barh(range(_K + 1), [*masses, float(rows.tail_logprob[0].exp())], color=colours)
    bars[-1].set_hatch("///")
    bars[-1].set_edgecolor("white")
    axes.set_yticks(range(_K + 1), names, family="monospace", fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title(f"top_k, k = {_K}: ids and logprobs, one number for the rest", fontsize=9, loc="left", x=-0.3)
    _tidy(axes, "x")


def _draw_all(axes: Axes, ranked: np.ndarray, ranks: np.ndarray, rows: SparseRows) -> None:
    """Every id by its place, and what the drawn ones stand for."""
    places = np.arange(1, len(ranked) + 1)
    axes.plot(places, ranked, color="#555555", linewidth=1, label="the teacher")
    axes.axhline(_THRESHOLD, color="#999999", linewidth=0.8, linestyle="--")
    axes.annotate(f"threshold {_THRESHOLD:.3f}", (places[-1], _THRESHOLD), ha="right", va="bottom", fontsize=8)
    count = int(rows.counts[0])
    ids = rows.ids[0, :count].numpy()
    weights = rows.logprobs[0, :count].exp().numpy()
    assert rows.draws is not None
    is_head = (rows.draws[0, :count] == 0).numpy()
    axes.plot(
        ranks[ids][is_head] + 1, weights[is_head], "o", color=_KEPT, markersize=5, label="kept, with its probability"
    )
    axes.vlines(ranks[ids][~is_head] + 1, ranked[ranks[ids]][~is_head], weights[~is_head], color=_REST, linewidth=0.8)
    axes.plot(
        ranks[ids][~is_head] + 1, weights[~is_head], "D", color=_REST, markersize=4,
        label="drawn, with an equal part of the tail",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(1e-7, 1)
    axes.set_xlabel("ids, the likeliest first", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    axes.set_title("head_tail: the head, and draws from the tail", fontsize=9, loc="left")
    _tidy(axes, "both")


def draw_order(file: Path) -> None:
    """Which row groups each global batch of an epoch takes records of, and for which of two ranks."""
    order = StreamOrder(np.full(ROW_GROUPS, RECORDS), global_batch_sequences=BATCH, seed=0, lanes=LANES)
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    axes = figure.subplots()
    for rank, (colour, marker) in enumerate(((_KEPT, "o"), (_REST, "s"))):
        counts = np.zeros((order.batches_per_epoch, ROW_GROUPS), dtype=int)
        for step in range(order.batches_per_epoch):
            np.add.at(counts[step], order.compute_batch(step).slice(rank, 2).row_groups, 1)
        steps, row_groups = np.nonzero(counts)
        axes.scatter(
            steps, row_groups, s=5 * counts[steps, row_groups], c=colour, marker=marker, label=f"rank {rank} of 2"
        )
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("row group, as stored", fontsize=9)
    axes.set_yticks(range(0, ROW_GROUPS, 4))
    axes.invert_yaxis()
    figure.legend(loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    _tidy(axes, "both")
    _save(figure, file)


def _show(text: str) -> str:
    return text.replace(" ", "␣").replace("\n", "↵") or "∅"


def _tidy(axes: Axes, grid: str) -> None:
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _save(figure: Figure, file: Path) -> None:
    """Text stays text, and the same picture gives the same bytes."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "logitstore"}):
        figure.savefig(file, format="svg", metadata={"Date": None}, facecolor="white")


PICTURES = {"concepts-position.svg": draw_position, "concepts-order.svg": draw_order}


def main(folder: Path) -> None:
    """Write every picture into a folder."""
    for name, draw in PICTURES.items():
        draw(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
