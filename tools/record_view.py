"""One record with its text: what the teacher expected at every position, and what came."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import numpy as np

from logitstore.records import Record
from logitstore.settings import Settings
from logitstore.teacher.protocol import TeacherIdentity
from tools.opened_store import open_readable
from tools.position_filter import PositionFilter
from tools.record_choice import FIRST_POSITIONS, find_record, parse_positions
from tools.token_text import FindText, load_find_text

# What stands for bytes that are no character by themselves.
_BROKEN = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes, and so tokens


class Candidate(Settings):
    """A token of the support.

    Attributes:
        token_id, token: its id, and its text where there is a tokenizer.
        probability: that the teacher gave it; of a drawn token its weight, which is that probability in the mean alone.
        draws: how often it was drawn, 0 where it is kept for its probability; None in stores that draw nothing.
        is_next: whether it came next.
    """

    token_id: int
    token: str | None
    probability: float
    draws: int | None
    is_next: bool


class PositionView(Settings):
    """One position: computed from everything up to `token`, and about `next_token`.

    Attributes:
        position: 0-based.
        token_id, token: the last token that the teacher saw.
        next_token_id, next_token: the one that came next.
        next_token_probability: that the teacher gave it; None where it is unknown.
        next_token_slot: where it stands in the support, None outside of it.
        entropy: nats; None where it is unknown.
        tail_mass: probability outside the support; where supports are drawn, outside of its kept entries.
        support: entries in the support.
        is_taught: whether the loss mask holds the position.
        candidates: the first tokens of the support: the likeliest ones, likeliest first, and where supports are drawn,
            after those that are kept the drawn ones, most often drawn first.
    """

    position: int
    token_id: int
    token: str | None
    next_token_id: int
    next_token: str | None
    next_token_probability: float | None
    next_token_slot: int | None
    entropy: float | None
    tail_mass: float
    support: int
    is_taught: bool
    candidates: tuple[Candidate, ...]


class TextPiece(Settings):
    """A piece of the record's text, of one token or (where a character is spread over several) a few.

    `entropy` is the teacher's before the first of them, in nats; None for the first token shown.
    """

    text: str
    entropy: float | None


class DocumentPart(Settings):
    """A document of the record, see `logitstore.records.DocumentSpan`."""

    document_id: str
    start: int
    document_offset: int
    label: str | None


class RecordView(Settings):
    """Some positions of one record.

    Attributes:
        store: its address.
        address: unit/index of the record.
        source: the corpus source of its unit; None of a shard without its store.
        num_positions: of the whole record.
        searched: positions that a filter was held to, and of which `positions` are the first that pass; None without.
        found: how many of them pass; None likewise.
        mean_entropy, teacher_loss: nats, over the whole record; tokens held impossible are left out of the loss;
            None where they are unknown, the loss also where all tokens are.
        documents: that the record is made of.
        tokenizer: name of the tokenizer that made the text, None where there is none.
        tokenizer_trouble: why there is none.
        text: of the positions asked for, from the first one's token to the last one's next token.
        positions: those asked for.
        unreadable: what of the store is damaged, a line each; records were counted without it.
    """

    store: str
    address: str
    source: str | None
    num_positions: int
    searched: int | None
    found: int | None
    mean_entropy: float | None
    teacher_loss: float | None
    documents: tuple[DocumentPart, ...]
    tokenizer: str | None
    tokenizer_trouble: str | None
    text: tuple[TextPiece, ...]
    positions: tuple[PositionView, ...]
    unreadable: tuple[str, ...] = ()


def read_record_view(
    url: str,
    record: str,
    positions: str | None = None,
    *,
    top: int = 5,
    manifest: int | None = None,
    tokenizer: str | None = None,
    only: PositionFilter | None = None,
) -> RecordView:
    """Read one record and put its signal into words; of a damaged store too, where the record is whole.

    Args:
        url: of the store.
        record: `N`, 0-based in address order, or `UNIT/INDEX`.
        positions: `START:STOP`, half-open, either may be left out; None for the first 32 (that pass the filter).
        top: candidates at each position.
        manifest: number of a manifest; None for what is committed now.
        tokenizer: folder or name of a tokenizer in place of the teacher's.
        only: which positions to list; None for all.

    Raises:
        ConfigError: `record` or `positions` cannot be understood, or the filter needs a tokenizer and there is none.
        StoreNotFoundError: there is no store, or no such record.
        CorruptShardError: the record's bytes are damaged.
    """
    opened = open_readable(url, manifest)
    store = opened.store
    found = find_record(store, record)
    plan = store.plan
    return build_record_view(
        found,
        positions,
        url=store.url,
        source=plan.build_unit_table().source_of(found.address.unit, plan.files),
        teacher=plan.teacher,
        unknown=plan.unknown_scalars,
        top=top,
        tokenizer=tokenizer,
        only=only,
    ).model_copy(update={"unreadable": opened.unreadable})


def build_record_view(
    record: Record,
    positions: str | None,
    *,
    url: str,
    source: str | None,
    teacher: TeacherIdentity | None,
    unknown: Collection[str] = (),
    top: int,
    tokenizer: str | None,
    only: PositionFilter | None,
) -> RecordView:
    """A record's signal in words; see `read_record_view`.

    Args:
        url, source, teacher: where it is from, and whose words these are; None where nobody says.
        unknown: columns of scalars that the store does not know.
    """
    chosen = parse_positions(positions, record.num_positions, is_search=only is not None)
    name = tokenizer or (teacher.tokenizer_name if teacher is not None else None)
    find_text, trouble = load_find_text(name, teacher, may_fetch=tokenizer is not None)
    listed, num_found = list(chosen), None
    if only is not None:
        listed = only.find(record, chosen, None if trouble is not None else find_text)
        num_found = len(listed)
        listed = listed[:FIRST_POSITIONS] if positions is None else listed
    losses = -record.signal.next_token_logprob.astype(np.float64)
    return RecordView(
        store=url,
        address=str(record.address),
        source=source,
        num_positions=record.num_positions,
        searched=None if only is None else len(chosen),
        found=num_found,
        mean_entropy=None if "entropy" in unknown else _find_mean(record.signal.entropy.astype(np.float64)),
        teacher_loss=None if "next_token_logprob" in unknown else _find_mean(losses[~np.isinf(losses)]),
        documents=tuple(
            DocumentPart(document_id=d.document_id, start=d.start, document_offset=d.document_offset, label=d.label)
            for d in record.documents
        ),
        tokenizer=name if trouble is None else None,
        tokenizer_trouble=trouble,
        text=tuple(cut_text(record, chosen, find_text)),
        positions=tuple(view_position(record, position, find_text, top) for position in listed),
    )


def _find_mean(values: np.ndarray) -> float | None:
    """None where there are no values, or one is not known."""
    return None if not len(values) or np.isnan(values).any() else float(values.mean())


def view_position(record: Record, position: int, find_text: FindText, top: int) -> PositionView:
    """One position of a record in words."""
    signal = record.signal
    before = int(record.token_ids[position - 1]) if position else None
    token_id, next_id = int(record.token_ids[position]), int(record.token_ids[position + 1])
    ids, logprobs = signal.support_at(position)
    draws = signal.draws_at(position)
    slots = np.flatnonzero(ids == next_id)
    next_token_logprob = float(signal.next_token_logprob[position])
    return PositionView(
        position=position,
        token_id=token_id,
        token=find_text(before, [token_id]),
        next_token_id=next_id,
        next_token=find_text(token_id, [next_id]),
        next_token_probability=None if math.isnan(next_token_logprob) else math.exp(next_token_logprob),
        next_token_slot=int(slots[0]) if len(slots) else None,
        entropy=_find_entropy(record, position),
        tail_mass=math.exp(float(signal.tail_logprob[position])),
        support=len(ids),
        is_taught=bool(record.loss_mask[position]),
        candidates=tuple(
            Candidate(
                token_id=int(candidate),
                token=find_text(token_id, [int(candidate)]),
                probability=math.exp(float(logprob)),
                draws=None if draws is None else int(draws[slot]),
                is_next=int(candidate) == next_id,
            )
            for slot, (candidate, logprob) in enumerate(zip(ids[:top], logprobs[:top], strict=True))
        ),
    )


def _find_entropy(record: Record, position: int) -> float | None:
    return None if math.isnan(entropy := float(record.signal.entropy[position])) else entropy


def cut_text(record: Record, chosen: range, find_text: FindText) -> Iterator[TextPiece]:
    """The text of some positions in pieces that are whole characters; nothing without a tokenizer."""
    token_ids = record.token_ids.tolist()
    start = chosen.start
    while start <= chosen.stop:
        stop = start + 1
        before = token_ids[start - 1] if start else None
        text = find_text(before, token_ids[start:stop])
        if text is None:
            return
        while text.endswith(_BROKEN) and stop <= chosen.stop and stop - start < _LONGEST_CHARACTER:
            stop += 1
            text = find_text(before, token_ids[start:stop]) or ""
        entropy = None if start == chosen.start else _find_entropy(record, start - 1)
        yield TextPiece(text=text, entropy=entropy)
        start = stop
