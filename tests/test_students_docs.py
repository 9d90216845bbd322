"""What docs/students.md says: its settings load, it names every one of them, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from checkout import ROOT
from taught_stores import build_model, fill_store
from transformers import AutoModelForCausalLM

from logitstore.settings import build_settings
from trainer.config import TrainSettings
from trainer.export import ExportFormat
from trainer.optimizer_config import OptimizerSettings
from trainer.student_config import FromTeacherSettings, LoraSettings

PAGE = (ROOT / "docs/students.md").read_text(encoding="utf-8")
YAML = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("block", YAML)
def test_settings_of_the_page_are_valid(block: str) -> None:
    least = {"store": "s", "student": {"model": "m"}, "global_batch_sequences": 1, "steps": 1, "output": "o"}
    values: dict[str, Any] = yaml.safe_load(block)
    assert values
    build_settings(TrainSettings, {**least, **values}, where="docs/students.md")


@pytest.mark.parametrize("section", [FromTeacherSettings, LoraSettings, OptimizerSettings])
def test_page_shows_every_setting(section: type[Any]) -> None:
    for name in section.model_fields:
        assert any(re.search(rf"\b{name}:", block) for block in YAML), name


def test_page_names_every_optimizer_and_format() -> None:
    for kind in get_args(OptimizerSettings.model_fields["kind"].annotation):
        assert re.search(rf"\b{kind}\b", PAGE, re.IGNORECASE), kind
    for form in get_args(ExportFormat):
        assert f"`{form}`" in PAGE or f"--to {form}" in PAGE, form


def test_cut_of_the_page_begins_as_the_run_that_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs/quickstart"
    folder.mkdir(parents=True)
    teacher = build_model(1, num_hidden_layers=3)
    teacher.save_pretrained(folder / "teacher")
    fill_store(folder, teacher, range(1))
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "students/two-layers")
    assert saved.config.num_hidden_layers == 2
    for found, expected in zip(saved.parameters(), names["student"].parameters(), strict=True):
        assert torch.equal(found, expected)
    for place, kept in enumerate((0, 2)):
        weights = (model.model.layers[layer].mlp.up_proj.weight for model, layer in ((saved, place), (teacher, kept)))
        assert torch.equal(*weights)


def test_commands_of_the_page_are_those_of_the_help() -> None:
    from tools import export

    commands = re.findall(r"^    (logitstore export .*)$", PAGE, re.MULTILINE)
    assert len(commands) == 2
    assert all(command in str(export.command.__doc__) for command in commands)
