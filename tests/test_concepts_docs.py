"""docs/concepts.md shows what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from checkout import ROOT

from logitstore.stream.order import StreamOrder
from tools import pictures


def read_texts(picture: Path) -> list[str]:
    found = ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(text.itertext()) for text in found]


@pytest.mark.slow
def test_pictures_are_drawn_from_the_code(tmp_path: Path) -> None:
    pictures.main(tmp_path)
    page = (ROOT / "docs/concepts.md").read_text(encoding="utf-8")
    assert re.findall(r"!\[.+\]\((.+)\)", page) == sorted(pictures.PICTURES, reverse=True)
    for name in pictures.PICTURES:
        texts = read_texts(tmp_path / name)
        assert texts == read_texts(ROOT / "docs" / name), "draw it again: python -m tools.pictures docs"
        assert len(texts) > 10


def test_what_is_said_of_the_order_is_so() -> None:
    order = StreamOrder(
        np.full(pictures.ROW_GROUPS, pictures.RECORDS),
        global_batch_sequences=pictures.BATCH,
        seed=0,
        lanes=pictures.LANES,
    )
    assert (pictures.ROW_GROUPS, pictures.RECORDS, pictures.BATCH, pictures.LANES) == (24, 32, 32, 4)
    opened: dict[int, list[int]] = {}
    ranks: dict[int, set[int]] = {}
    for step in range(order.batches_per_epoch):
        for rank in range(2):
            for row_group in order.compute_batch(step).slice(rank, 2).row_groups.tolist():
                opened.setdefault(row_group, []).append(step)
                ranks.setdefault(row_group, set()).add(rank)
    assert sorted(opened) == list(range(pictures.ROW_GROUPS))
    assert {len(found) for found in ranks.values()} == {1}
    assert np.mean([1 + steps[-1] - steps[0] for steps in opened.values()]) == pytest.approx(8, abs=3)
    assert max(1 + steps[-1] - steps[0] for steps in opened.values()) <= 12
