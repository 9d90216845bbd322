"""Disks that take no more: trouble from outside, after which the same command goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from file_limits import files_of_at_most
from made_up import build_identity
from taught_stores import CONFIG, build_model
from training_runs import read_lines, train_until

from logitstore.errors import OutsideError
from trainer.config import StudentSettings, TrainSettings
from trainer.loop import train
from trainer.metrics import JsonLines
from trainer.student import save_student
from trainer.sweep.settings import read_sweep
from trainer.sweep.training import train_sweep

FULL = r"(?s)expected files that can be read and written, found .*too large.*look to room"


def test_lines_of_which_the_disk_takes_a_part_go_on_when_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    lines = JsonLines(path, first_step=0)
    lines.write(1, {"value": 1.0})
    with files_of_at_most(40), pytest.raises(OutsideError, match=FULL):
        lines.write(2, {"value": 2.0})
    assert path.stat().st_size == 40  # torn
    lines.close()
    lines = JsonLines(path, first_step=1)
    lines.write(2, {"value": 2.0})
    lines.close()
    assert [line["value"] for line in read_lines(path)] == [1.0, 2.0]


@pytest.mark.parametrize("num_bytes", [50, 5000], ids=["its config", "its weights"])
def test_student_that_the_disk_does_not_take_leaves_the_earlier_one(tmp_path: Path, num_bytes: int) -> None:
    student, settings = build_model(seed=1), StudentSettings.model_validate({"config": CONFIG})
    identity = build_identity(model=str(tmp_path / "teacher"))
    save_student(student, tmp_path / "student", identity, settings, card="the earlier one")
    with files_of_at_most(num_bytes), pytest.raises(OutsideError, match=FULL):
        save_student(student, tmp_path / "student", identity, settings, card="the later one")
    assert (tmp_path / "student/README.md").read_text(encoding="utf-8") == "the earlier one"
    assert (tmp_path / "student/model.safetensors").exists()


def test_run_whose_files_cannot_be_opened_again_goes_on_when_they_can(
    make_settings: Callable[..., TrainSettings],
) -> None:
    settings = make_settings(steps=2, held_out=None, log_every=1)
    train_until(settings, 1)
    metrics = Path(settings.output) / "metrics.jsonl"
    in_the_way = metrics.with_name(".metrics.jsonl.tmp")
    in_the_way.mkdir()
    with pytest.raises(OutsideError, match=r"metrics.jsonl: expected files .* found IsADirectoryError"):
        train(settings)
    in_the_way.rmdir()
    assert train(settings).steps == 2
    assert [line["step"] for line in read_lines(metrics)] == [1, 2]


def test_sweep_whose_record_finds_no_room_ends_as_trouble_from_outside(
    make_settings: Callable[..., TrainSettings], tmp_path: Path
) -> None:
    values = make_settings(output=tmp_path / "sweep").model_dump(mode="json", exclude_defaults=True)
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**values, "runs": [{"name": "one"}]}), encoding="utf-8")
    sweep = read_sweep(path)
    with files_of_at_most(100), pytest.raises(OutsideError, match=FULL.replace("expected", r"sweep\.json: expected")):
        train_sweep(sweep)
    assert not (sweep.output / "sweep.json").exists()
