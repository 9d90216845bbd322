"""A look at the first rows of a data set: how many entries, what they are normalized over, which token they mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from logitstore.corpus.files import CorpusFile, StorageOptions
from logitstore.errors import ConfigError
from logitstore.interchange.layout import Layout
from logitstore.interchange.parquet_files import check_columns, iterate_tables, open_parquet
from logitstore.interchange.rows import ForeignSequence, RejectedRowError, split_row
from logitstore.interchange.signals import Normalization, compute_masses

SAMPLED_FILES = 8
# Probabilities renormalized in bfloat16 miss 1 by about this.
_RENORMALIZED_SLACK = 4e-3
# Rows whose entries hold the token that they stand at more often than the one after it, by this share of positions,
# are shifted: text repeats a token at once in a few percent of its positions.
_SHIFT_MARGIN = 0.2


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a few rows tell of a data set.

    Attributes:
        rows: looked at and usable.
        top_k: most entries of a position.
        normalization: what the probabilities seem to be normalized over.
        median_mass: of the sums of the probabilities of a position.
        next_hits, same_hits: share of positions whose entries hold the token after them, and the token they stand at.
    """

    rows: int
    top_k: int
    normalization: Normalization
    median_mass: float
    next_hits: float
    same_hits: float


def take_sample(
    files: Sequence[CorpusFile], layout: Layout, vocab_size: int, storage_options: StorageOptions | None = None
) -> Sample:
    """Look at the first rows of some files, spread over the data set.

    Raises:
        ConfigError: a file lacks columns, no row can be used, or rows speak about another token than the layout says.
        CorpusError, OutsideError: a file cannot be read.
    """
    sequences: list[ForeignSequence] = []
    rejection: RejectedRowError | None = None
    rows = 0
    spread = np.linspace(0, len(files) - 1, min(SAMPLED_FILES, len(files))).round().astype(int)
    for index in np.unique(spread).tolist():
        for found in _read_first_rows(files[index], layout, storage_options):
            if isinstance(found, RejectedRowError):
                rejection = rejection or found
                continue
            usable = [sequence for sequence in found if not _has_bad_value(sequence)]
            if not usable:
                rejection = rejection or RejectedRowError("invalid_signal", "expected logprobs, found NaN or infinity")
                continue
            rows += 1
            sequences.extend(usable)
    if not sequences:
        found_instead = f"{rejection.reason}: {rejection.detail}" if rejection else "no row"
        raise ConfigError(
            f"{files[0].path}: expected rows of the layout, found none that can be used ({found_instead}); check "
            "--layout, and the compression config where there is one"
        )
    masses = np.concatenate([compute_masses(sequence) for sequence in sequences])
    sample = Sample(
        rows=rows,
        top_k=max(1, *(int(sequence.counts.max()) for sequence in sequences)),
        normalization=_guess_normalization(masses, sequences, vocab_size),
        median_mass=float(np.median(masses)) if len(masses) else 0.0,
        next_hits=_count_hits(sequences, 1),
        same_hits=_count_hits(sequences, 0),
    )
    _check(sample, files[0].path)
    return sample


def _read_first_rows(
    file: CorpusFile, layout: Layout, storage_options: StorageOptions | None
) -> Iterator[list[ForeignSequence] | RejectedRowError]:
    with open_parquet(file, storage_options) as parquet:
        check_columns(file.path, parquet.schema_arrow, layout)
        for _, table in iterate_tables(parquet, layout, range(min(1, parquet.num_row_groups))):
            for row in range(table.num_rows):
                try:
                    yield split_row(layout.read_row(table, row))
                except RejectedRowError as error:
                    yield error
            return


def _has_bad_value(sequence: ForeignSequence) -> bool:
    """Whether a value would spoil the figures of the sample; the import makes a dead letter of the sequence."""
    return bool((np.isnan(sequence.logprobs) | np.isposinf(sequence.logprobs)).any())


def _guess_normalization(masses: np.ndarray, sequences: Sequence[ForeignSequence], vocab_size: int) -> Normalization:
    """Over the support if nearly every sum is 1 although most of the vocabulary is left out."""
    counts = np.concatenate([sequence.counts for sequence in sequences])
    if not len(masses) or np.median(counts[counts > 0]) > vocab_size / 2:
        return "vocabulary"
    is_one = np.abs(masses - 1) <= _RENORMALIZED_SLACK
    return "support" if is_one.mean() > 0.999 else "vocabulary"


def _count_hits(sequences: Sequence[ForeignSequence], offset: int) -> float:
    hits = positions = 0
    for sequence in sequences:
        position = np.repeat(np.arange(len(sequence.counts)), sequence.counts)
        wanted = sequence.token_ids[offset : offset + len(sequence.counts)]
        hits += int((sequence.ids == wanted[position]).sum())
        positions += int((sequence.counts > 0).sum())
    return hits / max(1, positions)


def _check(sample: Sample, path: str) -> None:
    if not sample.median_mass <= 2:
        raise ConfigError(
            f"{path}: expected logprobs, found values whose exponentials sum to {sample.median_mass:.3g} at a typical "
            "position; logits whose normalization nobody stored cannot be used"
        )
    if sample.same_hits > sample.next_hits + _SHIFT_MARGIN:
        raise ConfigError(
            f"{path}: expected entries at position t to be about token t + 1, found that token among "
            f"{100 * sample.next_hits:.0f}% of them, and token t itself among {100 * sample.same_hits:.0f}%: the data "
            "set is shifted by one; for axolotl's older data give --alignment same"
        )
