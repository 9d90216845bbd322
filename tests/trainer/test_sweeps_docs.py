"""What docs/sweeps.md shows is valid and runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from checkout import ROOT
from training_runs import read_lines
from typer.testing import CliRunner

from logitstore.store.logit_store import LogitStore
from tools.cli import app
from trainer.sweep.plan import group_runs
from trainer.sweep.settings import SweepFile, read_sweep

PAGE = (ROOT / "docs/sweeps.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


def write_block(number: int, folder: Path) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(BLOCKS[number], encoding="utf-8")
    return path


def test_sweeps_of_the_page_are_valid(tmp_path: Path) -> None:
    found = []
    for number in range(3):
        sweep = read_sweep(write_block(number, tmp_path))
        found.append((len(sweep.runs), len(group_runs(sweep.runs, sweep.runs_at_once))))
    assert found == [(8, 1), (12, 6), (3, 1)]


def test_cache_of_the_page_is_one(tmp_path: Path) -> None:
    [block] = BLOCKS[3:]
    values = {**yaml.safe_load(BLOCKS[2]), **yaml.safe_load(block)}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    caches = {run.settings.cache for run in read_sweep(tmp_path / "sweep.yaml").runs}
    assert [cache.max_bytes for cache in caches if cache is not None] == [200_000_000_000]


def test_page_names_every_key_of_a_sweep() -> None:
    assert [name for name in SweepFile.model_fields if f"`{name}" not in PAGE] == []


@pytest.mark.slow
def test_four_students_of_the_page_are_swept_into_one_table_and_one_plot(
    taught_store: LogitStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the page's Python at the end, which finds nothing left to do."""
    monkeypatch.setattr("tools.sweep.set_up_logs", lambda **_: None)  # of the whole process
    path = write_block(0, tmp_path)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values.update(
        store=taught_store.url, steps=2, held_out={"source": "held"}, device="cpu", output=str(tmp_path / "out")
    )
    values["schedule"]["warmup_steps"] = 1
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    result = CliRunner().invoke(app, ["sweep", str(path), "--quiet"], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.stderr
    names = [f"{student}-{loss}" for student in ("h48", "h80", "h128", "h192") for loss in ("distilled", "text-only")]
    assert [line.split()[0] for line in result.stdout.splitlines() if line.startswith("h")] == names
    written = json.loads((tmp_path / "out/sweep.json").read_text(encoding="utf-8"))
    assert [run["name"] for run in written["runs"]] == names
    sizes = [run["parameters"] for run in written["runs"]]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4
    picture = (tmp_path / "out/sweep.svg").read_text(encoding="utf-8")
    assert all(f">{student}<" in picture for student in ("h48", "h80", "h128", "h192"))
    for name in names:
        assert read_lines(tmp_path / "out" / name / "metrics.jsonl")[-1]["step"] == 2
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code.replace('"sweep.yaml"', repr(str(path))), {})
