"""The mathematics of a sample: what parts of a corpus tell of the whole, and which sequences speak for it."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from logitstore.corpus.sequences import Sequence


@dataclass(frozen=True, kw_only=True, eq=False)
class PartSample:
    """What was looked at of one part of a corpus.

    Attributes:
        source: of the part.
        stands_for_bytes: text of the whole part.
        text_bytes: text that was looked at.
        documents, dead_letters: in it.
        sequences: made of it.
    """

    source: str
    stands_for_bytes: int
    text_bytes: int
    documents: int
    dead_letters: int
    sequences: list[Sequence]

    @property
    def positions(self) -> int:
        return sum(sequence.num_positions for sequence in self.sequences)

    @property
    def scale(self) -> float:
        """How many times the part is larger than what was looked at."""
        return self.stands_for_bytes / max(1, self.text_bytes)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Positions per byte of text, its relative standard error, and the share of documents that cannot be used."""

    positions_per_byte: float
    relative_error: float | None
    dead_letter_share: float


def estimate_ratio(parts: list[PartSample]) -> Ratio:
    """Positions per byte of a whole corpus from samples of its parts: a stratified estimate.

    Every part counts for its bytes, at its own ratio. The error is that of a random sample within each source (parts
    are evenly spread, which is better if anything), by how far the positions of its parts are from what their bytes
    would make of them at the source's ratio; None where no source has two parts. What was looked at in whole has none.
    """
    total_bytes = sum(part.stands_for_bytes for part in parts)
    positions = sum(part.scale * part.positions for part in parts)
    documents = sum(part.scale * part.documents for part in parts)
    dead_letters = sum(part.scale * part.dead_letters for part in parts)
    by_source: dict[str, list[PartSample]] = defaultdict(list)
    for part in parts:
        by_source[part.source].append(part)
    variances = [_compute_variance(of_source) for of_source in by_source.values() if len(of_source) > 1]
    return Ratio(
        positions_per_byte=positions / max(1, total_bytes),
        relative_error=math.sqrt(sum(variances)) / positions if variances and positions else None,
        dead_letter_share=dead_letters / documents if documents else 0.0,
    )


def _compute_variance(parts: list[PartSample]) -> float:
    """Variance of the positions of a source: of a ratio to its bytes, in a sample of a finite number of them."""
    all_bytes = max(1, sum(part.stands_for_bytes for part in parts))
    seen_share = min(1.0, sum(part.text_bytes for part in parts) / all_bytes)
    ratio = sum(part.scale * part.positions for part in parts) / all_bytes
    residuals = [part.scale * part.positions - ratio * part.stands_for_bytes for part in parts]
    spread = len(parts) * sum(residual**2 for residual in residuals) / (len(parts) - 1)
    return (1.0 - seen_share) * spread


def choose_sequences(parts: list[PartSample], num_positions: int) -> list[Sequence]:
    """About `num_positions` positions of sequences, so that each part has as many as it has in the corpus.

    Systematic sampling: a sequence is chosen with a probability in proportion to the sequences that it stands for. At
    least one where there is one, in the order of the corpus, none twice.
    """
    candidates = [(part.scale, sequence) for part in parts for sequence in part.sequences]
    whole = sum(scale * sequence.num_positions for scale, sequence in candidates)
    chosen: list[Sequence] = []
    reached = 0.5
    for scale, sequence in candidates:
        reached += min(1.0, scale * num_positions / whole)
        if reached >= 1.0:
            chosen.append(sequence)
            reached -= 1.0
    return chosen or [sequence for _, sequence in candidates[:1]]
