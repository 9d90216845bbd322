"""The documents of a store that could not be used, with file, place and reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from logitstore.corpus.documents import DeadLetter
from logitstore.settings import Settings
from logitstore.store.commit import build_commit_path, parse_commit
from tools.look import build_table, format_count
from tools.opened_store import open_readable

if TYPE_CHECKING:
    from rich.console import RenderableType


class ListedDeadLetter(DeadLetter):
    """A dead letter, and the unit that met it."""

    unit: int


class DeadLetterList(Settings):
    """Dead letters of a store: how many by reason, and those that the commits list (up to 1,000 of every unit).

    `unreadable` says what is damaged and not counted, a line each.
    """

    store: str
    counts: dict[str, int]
    dead_letters: tuple[ListedDeadLetter, ...]
    unreadable: tuple[str, ...]


def read_dead_letters(url: str, manifest: int | None = None) -> DeadLetterList:
    """List the dead letters of a store, in corpus order.

    Raises:
        StoreNotFoundError, IncompatibleStoreError, CorruptShardError: there is no store, or it cannot be read.
    """
    opened = open_readable(url, manifest)
    units = opened.store.manifest.read_units("unit", "documents", "recorded_documents")
    with_some = [
        unit
        for unit, documents, recorded in zip(
            units["unit"].to_pylist(),
            units["documents"].to_pylist(),
            units["recorded_documents"].to_pylist(),
            strict=True,
        )
        if documents > recorded
    ]
    paths = [build_commit_path(unit) for unit in with_some]
    letters = [
        ListedDeadLetter(unit=unit, **letter.model_dump())
        for unit, path, data in zip(with_some, paths, opened.files.read_many(paths), strict=True)
        for letter in parse_commit(data, f"{url}/{path}").dead_letters
    ]
    counts = opened.store.compute_statistics().dead_letters
    return DeadLetterList(
        store=opened.store.url, counts=counts, dead_letters=tuple(letters), unreadable=opened.unreadable
    )


def render_dead_letters(letters: DeadLetterList) -> list[RenderableType]:
    """What `logitstore inspect STORE --dead-letters` shows."""
    if not letters.dead_letters:
        return [f"{letters.store}: every document was used."]
    total = sum(letters.counts.values())
    rows = [(letter.unit, letter.reason, letter.document_id, letter.detail) for letter in letters.dead_letters]
    listed = "" if total == len(rows) else f", {format_count(len(rows))} of them listed"
    return [
        build_table(None, ["#unit", "reason", "document", "what was found"], rows),
        f"{format_count(total)} documents could not be used{listed}.",
    ]
