"""docs/library.md: its blocks run on a store, and it names what there is."""

from __future__ import annotations

import re

import pytest
from checkout import ROOT

import logitstore
import trainer
from logitstore.settings import read_settings
from trainer.loop import train

PAGE = (ROOT / "docs/library.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_blocks_of_the_page_run_on_a_store(small_store_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in BLOCKS:
        if not block.startswith("# train"):
            exec(block.replace("runs/quickstart/store", small_store_url), names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("60 records, ")
    assert len(printed) == 5


def test_block_that_trains_calls_what_there_is() -> None:
    [block] = [block for block in BLOCKS if block.startswith("# train")]
    names: dict[str, object] = {}
    exec("\n".join(line for line in block.splitlines() if line.startswith("from ")), names)
    assert names["read_settings"] is read_settings
    assert names["train"] is train


@pytest.mark.parametrize("name", [*logitstore.__all__, *trainer.__all__])
def test_page_names_what_is_public(name: str) -> None:
    assert name.startswith("_") or f"`{name}`" in PAGE
