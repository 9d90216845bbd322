"""Which positions of a record are worth a look: by entropy, by surprise, by what comes next."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from logitstore.errors import ConfigError
from logitstore.records import Record
from tools.token_text import FindText


@dataclass(frozen=True, kw_only=True)
class PositionFilter:
    """What a position has to have, all of it.

    Attributes:
        min_entropy: nats, of the teacher's distribution.
        min_surprise: nats, −log of the probability of the token that comes next.
        pattern: of which the text of the next token has to hold a match.
    """

    min_entropy: float | None = None
    min_surprise: float | None = None
    pattern: re.Pattern[str] | None = None

    def find(self, record: Record, positions: Sequence[int], find_text: FindText | None) -> list[int]:
        """Those of the positions that have it, in order; where a number is not known, a position has it not.

        Raises:
            ConfigError: there is a pattern, and no tokenizer.
        """
        chosen = np.asarray(positions, dtype=np.int64)
        if self.min_entropy is not None:
            chosen = chosen[record.signal.entropy[chosen] >= self.min_entropy]
        if self.min_surprise is not None:
            chosen = chosen[-record.signal.next_token_logprob[chosen] >= self.min_surprise]
        passing: list[int] = chosen.tolist()
        if self.pattern is None:
            return passing
        if find_text is None:
            raise ConfigError(
                "--matching: expected a tokenizer to have text to match, found none; name one with --tokenizer"
            )
        ids = record.token_ids.tolist()
        return [t for t in passing if self.pattern.search(find_text(ids[t], [ids[t + 1]]) or "")]


def build_filter(min_entropy: float | None, min_surprise: float | None, matching: str | None) -> PositionFilter | None:
    """A filter of options; None where there are none.

    Raises:
        ConfigError: the pattern is no regular expression.
    """
    if min_entropy is None and min_surprise is None and matching is None:
        return None
    try:
        pattern = None if matching is None else re.compile(matching)
    except re.error as error:
        raise ConfigError(f"--matching {matching!r}: expected a regular expression, found {error}") from error
    return PositionFilter(min_entropy=min_entropy, min_surprise=min_surprise, pattern=pattern)
