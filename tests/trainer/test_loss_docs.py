"""What docs/losses.md says: its settings load, its Python runs, it names every loss."""

from __future__ import annotations

import re
from typing import get_args

import pytest
import yaml
from checkout import ROOT
from made_up import VOCAB_SIZE

from trainer.loss.settings import LossKind, LossSettings

PAGE = (ROOT / "docs/losses.md").read_text(encoding="utf-8")
YAML = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_page_tells_when_to_use_every_loss_and_what_it_computes() -> None:
    advice, formulas = PAGE.split("## What they compute")
    for kind in get_args(LossKind):
        assert f"`{kind}`" in advice, kind
        assert f"| `{kind}` |" in formulas, kind


def test_page_names_every_setting_that_a_loss_has() -> None:
    for name in LossSettings.model_fields:
        assert re.search(rf"\b{name}\b", PAGE), name


@pytest.mark.parametrize("block", YAML)
def test_settings_of_the_page_are_valid(block: str) -> None:
    assert LossSettings.model_validate(yaml.safe_load(block)["loss"]) != LossSettings(kind="cross_entropy")


@pytest.mark.parametrize("block", PYTHON)
def test_python_of_the_page_runs(block: str, small_store_url: str) -> None:
    exec(block.replace("runs/quickstart/store", small_store_url), {"VOCAB_SIZE": VOCAB_SIZE})
