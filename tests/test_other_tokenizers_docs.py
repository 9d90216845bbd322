"""What docs/other-tokenizers.md says beside its settings: its commands exist, what it measures is what there is."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
from checkout import ROOT
from typer.testing import CliRunner

from tools.cli import app
from trainer.evaluation import Evaluation
from trainer.vocabularies.student_reader import _ENOUGH_TEXT

PAGE = " ".join((ROOT / "docs/other-tokenizers.md").read_text(encoding="utf-8").split())


@pytest.mark.parametrize(("command", "option"), [("quickstart", "--folder"), ("benchmark vocabularies", "--steps")])
def test_commands_of_the_page_have_their_options(command: str, option: str) -> None:
    assert re.search(rf"`logitstore {command} .*?{option} ", PAGE)
    shown = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    assert option in shown.output


def test_page_names_figures_and_bounds_that_there_are() -> None:
    for name in ("bits_per_byte", "teacher_bits_per_byte", "span_kl", "compared_bytes"):
        assert f"`{name}`" in PAGE
        assert name in {field.name for field in fields(Evaluation)}
    assert f"as a warning below {_ENOUGH_TEXT:.0%}" in PAGE
