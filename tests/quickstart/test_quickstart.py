"""The quickstart, whole but small, with its shipped settings and teacher."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cluster.settings import ClusterCaptureSettings
from logitstore.errors import ConfigError
from logitstore.settings import read_settings
from logitstore.store.logit_store import LogitStore
from logitstore.teacher.loading import load_teacher
from logitstore.teacher.protocol import TeacherSettings, TopKMethod
from tools.quickstart.corpus import build_stdlib_root, is_held_out, read_sources
from tools.quickstart.run import HERE, TEACHER, run_quickstart
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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quickstart_ends_with_two_students_and_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "ray-token"))
    (tmp_path / "ray-token").write_text("0" * 32)
    folder = tmp_path / "quickstart"
    console = Console(width=100, record=True)
    result = run_quickstart(folder, console=console, steps=12, train_bytes=90_000, held_out_bytes=8_000)
    store = LogitStore.open(str(folder / "store"))
    assert store.list_sources() == ["held_out", "train"]
    assert result.positions == store.compute_statistics().positions > 20_000
    session, page = console.export_text(), result.report.read_text(encoding="utf-8")
    for value in (result.distilled.bucket_kl, result.text_only.bucket_kl):
        assert f"{value:.4f}" in session
        assert f"{value:.4f}" in page
    losses = [
        [json.loads(line)["train/cross_entropy"] for line in lines if "train/cross_entropy" in line]
        for lines in ((folder / name / "metrics.jsonl").read_text().splitlines() for name in ("text-only", "distilled"))
    ]
    assert len(losses[0]) == len(losses[1]) > 0
    captured = sorted((folder / "store" / "data").iterdir())
    again = run_quickstart(folder, console=console, steps=12, train_bytes=90_000, held_out_bytes=8_000)
    assert sorted((folder / "store" / "data").iterdir()) == captured
    assert again.distilled.bucket_kl == result.distilled.bucket_kl


def test_quickstart_in_a_folder_of_other_files_refuses_and_leaves_them(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="files that are not a quickstart's"):
        run_quickstart(tmp_path, console=Console(quiet=True), overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
