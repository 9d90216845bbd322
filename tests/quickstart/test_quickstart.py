"""The quickstart, whole but small, with its shipped settings and teacher."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkout import ROOT
from rich.console import Console

from cluster.settings import ClusterCaptureSettings
from logitstore.errors import ConfigError
from logitstore.settings import read_settings
from logitstore.store.logit_store import LogitStore
from logitstore.teacher.loading import load_teacher
from logitstore.teacher.protocol import TeacherSettings, TopKMethod
from tools.quickstart import HERE, TEACHER
from tools.quickstart.corpus import build_stdlib_root, is_held_out, read_sources
from tools.quickstart.run import run_quickstart
from trainer.config import TrainSettings


def test_shipped_settings_are_valid_and_point_into_the_quickstart_folder() -> None:
    capture = read_settings(ClusterCaptureSettings, HERE / "capture.yaml")
    train = read_settings(TrainSettings, HERE / "train.yaml")
    assert capture.store == train.store
    assert capture.actors.count == 2
    assert train.held_out is not None
    assert train.held_out.source in capture.corpus.urls_of_source()


def test_shipped_teacher_is_small_and_predicts_code_it_never_saw() -> None:
    assert (TEACHER / "model.safetensors").stat().st_size <= 12_000_000
    settings = TeacherSettings(model=str(TEACHER), dtype="float32", device="cpu")
    teacher = load_teacher(settings, TopKMethod(k=8))
    texts = [text for path, text in read_sources(build_stdlib_root()) if is_held_out(path) and len(text) > 5000][:8]
    sequences = [np.array(token_ids[256:513], dtype=np.int32) for token_ids in teacher.encode(texts)]
    losses = np.concatenate([-signal.next_token_logprob for signal in teacher.score(sequences)])
    assert losses.mean() < 3.0  # uniform guessing: 8.3 nats
    assert teacher.decode(teacher.encode(texts)[0]) == texts[0]


SMALL = """
import sys
from pathlib import Path
from rich.console import Console
from tools.quickstart.run import run_quickstart

run_quickstart(Path(sys.argv[1]), console=Console(width=100), steps=12, train_bytes=90_000, held_out_bytes=8_000)
"""


def run_small_quickstart(folder: Path, home: Path) -> str:
    """What a small quickstart prints; in a process of its own, since Ray reads its authentication settings once."""
    token = home / "ray-token"
    token.write_text("0" * 32)
    environment = {
        **os.environ,
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    command = [sys.executable, "-c", SMALL, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_figures(session: str, label: str) -> list[str]:
    """The two students' figures in a row of the table."""
    [line] = [line for line in session.splitlines() if label in line]
    return re.findall(r"\d+\.\d+", line)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quickstart_ends_with_two_students_and_a_report_and_can_be_run_again(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    session = run_small_quickstart(folder, tmp_path)
    store = LogitStore.open(str(folder / "store"))
    assert store.list_sources() == ["held_out", "train"]
    positions = store.compute_statistics().positions
    assert positions > 20_000
    assert f"{positions:,} positions: all as committed" in session
    page = (folder / "report.html").read_text(encoding="utf-8")
    for label in ("KL to the teacher", "LM loss"):
        figures = read_figures(session, label)
        assert len(set(figures)) == 2
        assert all(figure in page for figure in figures)

    captured = sorted((folder / "store" / "data").iterdir())
    again = run_small_quickstart(folder, tmp_path)
    assert "all captured before" in again
    assert sorted((folder / "store" / "data").iterdir()) == captured
    assert read_figures(again, "KL to the teacher") == read_figures(session, "KL to the teacher")


def test_quickstart_in_a_folder_of_other_files_refuses_and_leaves_them(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="files that are not a quickstart's"):
        run_quickstart(tmp_path, console=Console(quiet=True), overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
