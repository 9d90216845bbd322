"""How a record looks in a terminal: its text by the teacher's entropy, then position by position."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from tools.look import build_facts, build_table, format_count, format_entropy, format_loss, format_share
from tools.record_view import Candidate, PositionView, RecordView
from tools.visible_text import make_visible

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

# Nats below which a colour holds: about 1, 3, 7, 20 equally likely tokens.
_STYLES = ((0.3, "green3"), (1.0, "chartreuse3"), (2.0, "gold3"), (3.0, "dark_orange"), (float("inf"), "red"))
_LONGEST_TOKEN = 16


def render_record_view(view: RecordView) -> list[RenderableType]:
    """What `logitstore inspect STORE --record` shows."""
    parts: list[RenderableType] = [_build_head(view)]
    if view.tokenizer is None:
        parts.append(Text(f"Ids instead of text: {view.tokenizer_trouble}", style="yellow"))
    else:
        parts += [_build_text(view), _build_legend()]
    if view.positions:
        parts.append(_build_positions(view))
    return parts


def _build_head(view: RecordView) -> Table:
    first, last = (view.positions[0].position, view.positions[-1].position) if view.positions else (0, 0)
    facts: list[tuple[str, object]] = [
        ("record", f"{view.address} of {view.store}"),
        ("source", view.source),
        ("positions", _describe_shown(view, first, last)),
        ("entropy", format_entropy(view.mean_entropy)),
        ("teacher's loss", format_loss(view.teacher_loss)),
    ]
    for i, part in enumerate(view.documents):
        stop = view.documents[i + 1].start if i + 1 < len(view.documents) else view.num_positions + 1
        if part.start <= last + 1 and stop > first:
            continued = f", from its token {format_count(part.document_offset)}" if part.document_offset else ""
            name = make_visible(part.document_id)
            label = f", label {make_visible(part.label)}" if part.label else ""
            facts.append(("document", f"{name} (tokens {part.start} to {stop - 1}{continued}{label})"))
    return build_facts(facts)


def _describe_shown(view: RecordView, first: int, last: int) -> str:
    if view.searched is not None:
        shown = f"{format_count(view.found or 0)} of {format_count(view.searched)} that were searched"
        if len(view.positions) < (view.found or 0):
            shown += f", the first {len(view.positions)} shown (--positions START:STOP shows all of a range)"
        return shown
    shown = f"{first} to {last} of {format_count(view.num_positions)}"
    return shown if len(view.positions) == view.num_positions else shown + " (--positions START:STOP shows others)"


def _build_text(view: RecordView) -> Text:
    """The text as it is; each token in the colour of the teacher's entropy before it."""
    text = Text()
    for piece in view.text:
        text.append(make_visible(piece.text, keep_lines=True), style=find_style(piece.entropy))
    return text


def _build_legend() -> Text:
    legend = Text("Colour: entropy of the teacher before the token, nats ", style="dim")
    low = 0.0
    for high, style in _STYLES:
        legend.append(
            f" {low:g} to {high:g} " if high != float("inf") else f" above {low:g} ", style=f"{style} not dim"
        )
        low = high
    return legend


def _build_positions(view: RecordView) -> Table:
    rows = [
        (
            position.position,
            Text(name_token(position.next_token, position.next_token_id), style=find_style(position.entropy)),
            "?" if position.next_token_probability is None else format_share(position.next_token_probability),
            "–" if position.next_token_slot is None else position.next_token_slot,
            "?" if position.entropy is None else f"{position.entropy:.2f}",
            format_share(position.tail_mass),
            _build_candidates(position),
        )
        for position in view.positions
    ]
    is_drawn = any(candidate.draws is not None for position in view.positions for candidate in position.candidates)
    what = "kept candidates in %, drawn ones by draws" if is_drawn else "the teacher's candidates in %"
    columns = ["#at", "next", "#share", "#slot", "#nats", "#tail", f"{what}, ▸ came next"]
    return build_table(None, columns, rows)


def _build_candidates(position: PositionView) -> Text:
    line = Text("" if position.is_taught else "not taught: ", style="" if position.is_taught else "dim")
    for candidate in position.candidates:
        name = name_token(candidate.token, candidate.token_id)
        mark = "▸" if candidate.is_next else ""
        line.append(f"{mark}{name} {_describe_share(candidate)}", style="bold" if candidate.is_next else "")
        line.append("  ")
    line.rstrip()
    return line


def _describe_share(candidate: Candidate) -> str:
    """A probability in percent; of a drawn token no such number, for one draw's weight says nothing about the token."""
    if candidate.draws:
        return f"drawn ×{candidate.draws}"
    percent = 100 * candidate.probability
    return f"{percent:.0f}" if percent >= 9.95 else f"{percent:.1f}" if percent >= 0.05 else "<0.1"


def find_style(entropy: float | None) -> str:
    """The colour of an entropy in nats; none where it is not known."""
    if entropy is None:
        return ""
    return next(style for limit, style in _STYLES if entropy < limit or limit == float("inf"))


def name_token(token: str | None, token_id: int) -> str:
    """A token in a table: its text with spaces to be seen, or its id."""
    if token is None:
        return str(token_id)
    if not token or "\ufffd" in token:  # nothing to see, or a part of a character
        return f"<{token_id}>"
    visible = make_visible(token).replace(" ", "·")
    return visible if len(visible) <= _LONGEST_TOKEN else visible[: _LONGEST_TOKEN - 1] + "…"
