"""How the comparison of two stores looks in a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.text import Text

from tools.look import build_facts, build_table, count_things, format_count, format_share
from tools.record_text import name_token
from tools.record_view import PositionView
from tools.store_diff import ComparedStore, DifferentPosition, Distances, StoreDiff
from tools.visible_text import make_visible

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_CONTEXT_CHARACTERS = 28


def render_diff(diff: StoreDiff) -> list[RenderableType]:
    """What `logitstore diff` shows."""
    parts: list[RenderableType] = [_build_stores(diff), _build_distances(diff)]
    if len(diff.sources) > 1 and diff.distances.positions:
        rows = [(name, *_build_row(distances)) for name, distances in diff.sources.items()]
        parts.append(
            build_table("By source", ["source", "#positions", "#KL", "#KL back", "#variation", "#same first"], rows)
        )
    if diff.most_different:
        if diff.tokenizer_trouble is not None:
            parts.append(Text(f"Ids instead of text: {diff.tokenizer_trouble}", style="yellow"))
        parts.append(_build_positions(diff))
    return parts


def _build_stores(diff: StoreDiff) -> Table:
    sides = (diff.first, diff.second)
    rows: list[tuple[str, ...]] = [
        (name, *(_show(getattr(side, name.replace(" ", "_"))) for side in sides))
        for name in ("store", "manifest", "teacher", "engine", "method", "codec")
    ]
    rows.append(("teacher's loss", *(_describe_loss(side) for side in sides)))
    rows.append(("mean entropy", *(_show(side.mean_entropy, "nats") for side in sides)))
    rows.append(("left out", *(count_things(side.left_out, "record") if side.left_out else "–" for side in sides)))
    return build_table(None, ["", "first", "second"], rows)


def _build_distances(diff: StoreDiff) -> Table:
    distances = diff.distances
    taught = f"{format_count(diff.positions_taught)} taught positions"
    facts: list[tuple[str, object]] = [("compared", f"{count_things(diff.records, 'record')}, {taught}")]
    if not distances.positions:
        facts.append(("distance", "unknown: no position has kept tokens in both stores, drawn ones tell none"))
        return build_facts(facts)
    if distances.positions < diff.positions_taught:
        facts.append(("", f"{format_count(distances.positions)} of them with kept tokens in both stores"))
    quantiles = ", ".join(f"{100 * float(share):g}%: {show_kl(end)}" for share, end in diff.kl_quantiles.items())
    facts += [
        ("KL", f"{distances.kl:.3g} nats at least, second from first; {distances.reverse_kl:.3g} first from second"),
        ("", f"no more than, of positions: {quantiles}"),
        ("variation", f"{distances.total_variation:.3g} at least, half the sum of |p − q|"),
        ("same first", describe_agreement(distances.agreement, "{} of positions have one likeliest token")),
    ]
    if distances.infinite:
        what = "where one store holds impossible what the other does not; not in the means"
        facts.append(("infinite", f"{count_things(distances.infinite, 'position')} {what}"))
    return build_facts(facts)


def show_kl(nats: float | None) -> str:
    """A KL to two digits; None is infinite."""
    return "∞" if nats is None else f"{nats:.2g}"


def describe_agreement(share: float | None, text: str) -> str:
    """The share of positions with one likeliest token, in a text; None is unknown, for other tokens were kept."""
    return "unknown" if share is None else text.format(format_share(share))


def _build_row(distances: Distances) -> tuple[str, ...]:
    return (
        format_count(distances.positions),
        f"{distances.kl:.3g}",
        f"{distances.reverse_kl:.3g}",
        f"{distances.total_variation:.3g}",
        describe_agreement(distances.agreement, "{}"),
    )


def _build_positions(diff: StoreDiff) -> Table:
    rows = [
        (
            f"{entry.record}:{entry.first.position}",
            show_kl(entry.kl),
            _build_context(entry),
            _build_candidates(entry.first),
            _build_candidates(entry.second),
        )
        for entry in diff.most_different
    ]
    title = "Most different (logitstore inspect STORE --record UNIT/INDEX shows one)"
    return build_table(title, ["record:at", "#KL", "text ▸ next", "first says, in %", "second says, in %"], rows)


def _build_context(entry: DifferentPosition) -> Text:
    text = Text()
    if entry.context is not None:
        text.append(make_visible(entry.context)[-_CONTEXT_CHARACTERS:], style="dim")
    return text.append(f" ▸{name_token(entry.first.next_token, entry.first.next_token_id)}", style="bold")


def _build_candidates(position: PositionView) -> Text:
    line = Text()
    for candidate in position.candidates:
        if candidate.draws:
            continue
        name = name_token(candidate.token, candidate.token_id)
        percent = f"{100 * candidate.probability:.0f}" if candidate.probability >= 0.005 else "<1"
        line.append(f"{name} {percent}  ", style="bold" if candidate.is_next else "")
    line.rstrip()
    return line


def _describe_loss(side: ComparedStore) -> str:
    if side.teacher_loss is None:
        return "unknown"
    return f"{side.teacher_loss:.4f} nats (perplexity {math.exp(min(side.teacher_loss, 700)):,.2f})"


def _show(value: object, unit: str = "") -> str:
    if value is None:
        return "none lists it" if not unit else "unknown"
    return f"{value:.4f} {unit}" if isinstance(value, float) else str(value)
