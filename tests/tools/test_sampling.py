"""How sure a sample of a corpus may be of the whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tools.sampling import PartSample, estimate_ratio


def build_part(positions: int, text_bytes: int, stands_for_bytes: int, source: str = "text") -> PartSample:
    sequence: Any = SimpleNamespace(num_positions=positions)
    return PartSample(
        source=source,
        stands_for_bytes=stands_for_bytes,
        text_bytes=text_bytes,
        documents=1,
        dead_letters=0,
        sequences=[sequence],
    )


def test_error_is_none_of_one_part_and_0_of_what_was_looked_at_in_whole() -> None:
    assert estimate_ratio([build_part(10, 40, 400)]).relative_error is None
    whole = estimate_ratio([build_part(10, 40, 40), build_part(50, 100, 100)])
    assert (whole.positions_per_byte, whole.relative_error) == (pytest.approx(60 / 140), 0.0)


def test_parts_of_unequal_size_and_one_ratio_have_no_error() -> None:
    parts = [build_part(10, 40, 400), build_part(10, 40, 4_000), build_part(100, 400, 800)]
    assert estimate_ratio(parts).relative_error == pytest.approx(0.0, abs=1e-9)


def test_error_is_how_far_estimates_are_off() -> None:
    """Twelve parts of twenty documents, of which five were looked at; many such corpora."""
    generator = np.random.default_rng(0)
    errors, promised = [], []
    for _ in range(400):
        positions = generator.normal(250, 60, (12, 20)).round().astype(int)
        parts = [build_part(int(part[:5].sum()), 5_000, 20_000) for part in positions]
        ratio = estimate_ratio(parts)
        errors.append(ratio.positions_per_byte * 12 * 20_000 / positions.sum() - 1)
        assert ratio.relative_error is not None
        promised.append(ratio.relative_error**2)
    assert np.mean(np.square(errors)) == pytest.approx(np.mean(promised), rel=0.2)
