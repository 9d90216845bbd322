"""The page's sections about whole stores: overview, distributions, and the comparison of two."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from logitstore.shard.summary import ENTROPY_BIN_NATS
from tools.charts import Line, build_bar_chart, build_line_chart
from tools.diff_tables import describe_agreement, show_kl
from tools.look import count_things
from tools.page import build_charts, build_table, choose_style, write_text
from tools.record_text import name_token
from tools.record_view import PositionView
from tools.store_diff import ComparedStore, Distances, StoreDiff
from tools.store_overview import StoreOverview, list_column_rows, list_facts
from tools.store_report.sample import PROBABILITY_BINS, Sample
from tools.store_report.token_table import escape_invisible

_SUPPORT_BINS = 64
_CONTEXT_CHARACTERS = 40


def build_section(name: str, title: str, body: str) -> str:
    """A section of the page with its heading; nothing of an empty one."""
    if not body:
        return ""
    return f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{body}</section>'


def show(value: object) -> str:
    """Any text as HTML, without characters that would turn lines around or are not to be seen."""
    return write_text(escape_invisible(str(value)))


def build_rows(facts: Sequence[tuple[str, object]]) -> str:
    """Names with their values, one below the other."""
    rows = (f"<div><dt>{show(name)}</dt><dd>{show(value)}</dd></div>" for name, value in facts if value is not None)
    return f'<dl class="rows">{"".join(rows)}</dl>'


def build_overview(overview: StoreOverview, damaged: Sequence[str]) -> str:
    """What `logitstore inspect` says of a store."""
    parts = [build_rows(list_facts(overview))]
    if troubles := [*overview.unreadable, *damaged]:
        items = "".join(f"<li>{show(trouble)}</li>" for trouble in troubles)
        parts.insert(0, f'<div class="trouble"><p>Could not be read, and is not counted:</p><ul>{items}</ul></div>')
    if overview.positions:
        rows = [[name, *(f"<td>{show(cell)}</td>" for cell in cells)] for name, *cells in list_column_rows(overview)]
        columns = ["column", "bytes", "share", "bytes per position"]
        table = build_table("Bytes of the shards, by column, and of everything else.", columns, rows)
        parts.append(f"<details><summary>Where the bytes are</summary>{table}</details>")
    if len(overview.sources) > 1:
        rows = [
            [
                escape_invisible(source.name),
                *(f"<td>{count:,}</td>" for count in (source.records, source.positions, source.documents)),
                f"<td>{'unknown' if source.teacher_loss is None else f'{source.teacher_loss:.3f}'}</td>",
            ]
            for source in overview.sources
        ]
        columns = ["source", "records", "positions", "documents", "teacher's loss, nats"]
        parts.append(build_table("By source of the corpus.", columns, rows))
    return "".join(parts)


def build_distributions(overviews: Sequence[StoreOverview], names: Sequence[str], sample: Sample) -> str:
    """Charts of what the teachers say everywhere; of several stores as shares, in one chart each."""
    x_and_values: list[tuple[str, str, float, list[Sequence[int] | np.ndarray]]] = [
        ("Entropy of the teacher", "nats", ENTROPY_BIN_NATS, [one.entropy_histogram for one in overviews]),
        (
            _name_tail(overviews),
            "decades below 1: from 10⁻ˣ down to a tenth of it",
            1.0,
            [one.tail_histogram for one in overviews],
        ),
    ]
    largest = max(len(sizes) for sizes in sample.support_sizes)
    width = max(1, math.ceil(largest / _SUPPORT_BINS))
    sizes = [_join_bins(counts, width) for counts in sample.support_sizes]
    x_and_values.append(("Tokens in the support", "tokens", float(width), [*sizes]))
    x_and_values.append(
        ("Probability of the token that came next", "probability", 1 / PROBABILITY_BINS, [*sample.next_probabilities])
    )
    charts = [_build_histogram(*one, names) for one in x_and_values]
    note = (
        f"Entropy and tail are those of all {overviews[0].positions:,} positions, supports and next tokens those of "
        f"{sample.positions_read:,} positions that were read for this page."
    )
    return f"{build_charts(charts)}<p>{note}</p>" if any(charts) else ""


def _name_tail(overviews: Sequence[StoreOverview]) -> str:
    """A tail is what is outside the support, or outside of what drawn supports keep."""
    drawn = sum(overview.method.is_drawn for overview in overviews)
    if drawn == 0:
        return "Probability outside the support"
    return "Probability drawn from" if drawn == len(overviews) else "Probability not kept"


def _join_bins(counts: np.ndarray, width: int) -> np.ndarray:
    joined: np.ndarray = np.add.reduceat(counts, np.arange(0, len(counts), width))
    return joined


def _build_histogram(
    title: str, label: str, width: float, histograms: Sequence[Sequence[int] | np.ndarray], names: Sequence[str]
) -> str:
    if len(histograms) == 1:
        return build_bar_chart(title, label, "positions", [int(count) for count in histograms[0]], width)
    lines = []
    used = max((i + 1 for counts in histograms for i, count in enumerate(counts) if count), default=0)
    for number, (name, counts) in enumerate(zip(names, histograms, strict=True)):
        total = sum(int(count) for count in counts)
        if total:
            # Sizes are whole numbers, those of a bin from its start to one below the next.
            middle = (width - 1) / 2 if label == "tokens" else width / 2
            points = tuple((i * width + middle, int(count) / total) for i, count in enumerate(counts[:used]))
            lines.append(Line(name=escape_invisible(name), points=points, style=choose_style(number)))
    return build_line_chart(title, label, "share of positions", lines)


def build_comparison_of_stores(diff: StoreDiff, names: Sequence[str]) -> str:
    """What `logitstore diff` says of two stores."""
    sides = (diff.first, diff.second)
    rows = [
        [label, *(f"<td>{show(value)}</td>" for value in (_describe_side(label, side) for side in sides))]
        for label in ("store", "manifest", "teacher", "engine", "method", "codec", "teacher's loss", "mean entropy")
    ]
    rows.append(["records left out", *(f"<td>{side.left_out:,}</td>" for side in sides)])
    table = build_table("The two stores; losses and entropies over the positions compared.", ["", *names], rows)
    parts = [f'<div class="texts">{table}</div>', build_rows(_list_distances(diff))]
    if len(diff.sources) > 1 and diff.distances.positions:
        columns = ["source", "positions", "KL", "KL back", "total variation", "same first"]
        rows = [[escape_invisible(name), *_build_distances(one)] for name, one in diff.sources.items()]
        parts.append(build_table("By source; KL in nats.", columns, rows))
    if diff.most_different:
        parts.append(_build_most_different(diff, names))
    return "".join(parts)


def _describe_side(label: str, side: ComparedStore) -> str:
    if label == "teacher's loss":
        return "unknown" if side.teacher_loss is None else f"{side.teacher_loss:.4f} nats per token"
    if label == "mean entropy":
        return "unknown" if side.mean_entropy is None else f"{side.mean_entropy:.4f} nats"
    value = getattr(side, label)
    return "none lists it" if value is None else str(value)


def _list_distances(diff: StoreDiff) -> list[tuple[str, object]]:
    distances = diff.distances
    facts: list[tuple[str, object]] = [
        ("compared", f"{count_things(diff.records, 'record')}, {diff.positions_taught:,} taught positions")
    ]
    if not distances.positions:
        return [*facts, ("distance", "unknown: no position has kept tokens in both stores, drawn ones tell none")]
    if distances.positions < diff.positions_taught:
        facts.append(("of them", f"{distances.positions:,} with kept tokens in both stores, which the rest is about"))
    quantiles = ", ".join(f"{show_kl(end)} at {100 * float(share):g}%" for share, end in diff.kl_quantiles.items())
    facts += [
        ("KL", f"{distances.kl:.3g} nats at least, second from first; {distances.reverse_kl:.3g} first from second"),
        ("KL up to", f"{quantiles} of positions"),
        ("total variation", f"{distances.total_variation:.3g} at least"),
        ("same first token", describe_agreement(distances.agreement, "at {} of positions")),
    ]
    if distances.infinite:
        facts.append(("infinite KL", f"at {count_things(distances.infinite, 'position')}, not in the means"))
    return facts


def _build_distances(distances: Distances) -> list[str]:
    cells = (
        f"{distances.positions:,}",
        f"{distances.kl:.3g}",
        f"{distances.reverse_kl:.3g}",
        f"{distances.total_variation:.3g}",
        describe_agreement(distances.agreement, "{}"),
    )
    return [f"<td>{cell}</td>" for cell in cells]


def _build_most_different(diff: StoreDiff, names: Sequence[str]) -> str:
    rows = [
        [
            f"{entry.record}:{entry.first.position}",
            f"<td>{show_kl(entry.kl)}</td>",
            f"<td><bdi>{show((entry.context or '')[-_CONTEXT_CHARACTERS:])}</bdi> "
            f"<b>▸{show(name_token(entry.first.next_token, entry.first.next_token_id))}</b></td>",
            _build_candidates(entry.first),
            _build_candidates(entry.second),
        ]
        for entry in diff.most_different
    ]
    columns = ["record:position", "KL, nats", "text ▸ what came next", *(f"{name}, %" for name in names)]
    return f'<div class="texts">{build_table("The most different positions.", columns, rows)}</div>'


def _build_candidates(position: PositionView) -> str:
    parts = []
    for candidate in position.candidates:
        name = show(name_token(candidate.token, candidate.token_id))
        percent = f"{100 * candidate.probability:.0f}" if candidate.probability >= 0.005 else "<1"
        value = f"×{candidate.draws}" if candidate.draws else write_text(percent)
        element = "b" if candidate.is_next else "span"
        parts.append(f"<{element}><bdi>{name}</bdi> {value}</{element}>")
    return f"<td>{' · '.join(parts)}</td>"
