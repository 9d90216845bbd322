"""The texts of the tokens of a page: each id once, and the characters that several tokens make together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from logitstore.records import Record
from tools.token_text import FindText, find_plain_token
from tools.visible_text import make_visible

# What stands for bytes that are no character by themselves, and how many tokens one may be made of.
_BROKEN = "\ufffd"
_LONGEST_CHARACTER = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTable:
    """The V tokens of a page, the most frequent first.

    Attributes:
        token_ids: [V] int64.
        texts: of each; None where no tokenizer can tell.
        characters: (record, place of the first token, tokens, text) of characters of several tokens.
    """

    token_ids: np.ndarray
    texts: tuple[str, ...] | None
    characters: tuple[tuple[int, int, int, str], ...]

    def find_places(self, token_ids: np.ndarray) -> np.ndarray:
        """[N] places in the table of [N] ids that it has."""
        order = np.argsort(self.token_ids)
        places: np.ndarray = order[np.searchsorted(self.token_ids, token_ids, sorter=order)]
        return places


def build_token_table(records: Sequence[Record], candidates: Sequence[np.ndarray], find_text: FindText) -> TokenTable:
    """The table of all tokens of some records and of the candidates at their positions.

    Args:
        records: whose characters of several tokens are found.
        candidates: arrays of ids.
        find_text: turns ids into text.
    """
    all_ids = [record.token_ids for record in records]
    found, counts = np.unique(np.concatenate([np.zeros(0, np.int32), *all_ids, *candidates]), return_counts=True)
    token_ids = found[np.argsort(-counts, kind="stable")].astype(np.int64)
    before = find_plain_token(token_ids.tolist(), find_text)
    texts = [find_text(before, [token_id]) for token_id in token_ids.tolist()]
    if not texts or texts[0] is None:
        return TokenTable(token_ids=token_ids, texts=None, characters=())
    broken = {token_id for token_id, text in zip(token_ids.tolist(), texts, strict=True) if _BROKEN in (text or "")}
    characters = [
        (number, start, length, escape_invisible(text))
        for number, record in enumerate(records)
        for start, length, text in _find_characters(record.token_ids.tolist(), broken, find_text)
    ]
    return TokenTable(
        token_ids=token_ids, texts=tuple(escape_invisible(text or "") for text in texts), characters=tuple(characters)
    )


def escape_invisible(text: str) -> str:
    """Text as the page shows it: without characters that steer or hide, but with its line ends and tabs."""
    return make_visible(text, keep_lines=True)


def _find_characters(token_ids: Sequence[int], broken: set[int], find_text: FindText) -> Iterator[tuple[int, int, str]]:
    """Place, number of tokens and text of what only several tokens make a character."""
    start = 0
    while start < len(token_ids):
        if token_ids[start] not in broken:
            start += 1
            continue
        before = token_ids[start - 1] if start else None
        for length in range(2, _LONGEST_CHARACTER + 1):
            text = find_text(before, token_ids[start : start + length]) or _BROKEN
            if start + length <= len(token_ids) and _BROKEN not in text:
                yield start, length, text
                start += length
                break
        else:
            start += 1
