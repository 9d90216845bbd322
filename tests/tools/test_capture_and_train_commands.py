"""`logitstore capture`, `train` and `evaluate`, one after the other, with a tiny teacher and a real Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """Settings of a capture and of a training run on it."""
    folder = tmp_path_factory.mktemp("commands")
    lines = [json.dumps({"text": f"def value_{i}(path):\n    return read(path, {i})\n" * 3}) for i in range(60)]
    (folder / "corpus.jsonl").write_text("\n".join([*lines, "", "{broken"]) + "\n")
    capture = {
        "store": str(folder / "store"),
        "corpus": {"files": [str(folder / "corpus.jsonl")]},
        "teacher": {"model": str(teacher_folder), "device": "cpu"},
        "method": {"k": 8},
        "sequences": {"length": 64},
        "shard": {"row_group_bytes": 10_000},
        "unit_bytes": 2_000,
        "actors": {"count": 1, "cpus": 1},
    }
    student = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    train = {
        "store": str(folder / "store"),
        "held_out": {"fraction": 0.3},
        "student": {"config": student},
        "global_batch_sequences": 2,
        "steps": 3,
        "output": str(folder / "run"),
        "device": "cpu",
    }
    (folder / "capture.yaml").write_text(yaml.safe_dump(capture))
    (folder / "train.yaml").write_text(yaml.safe_dump(train))
    (folder / "ray-token").write_text(uuid.uuid4().hex)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """Function that runs a command in a process of its own, with a home and a Ray of its own."""
    environment = {
        **os.environ,
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "ray-token"),
    }

    def call(*arguments: object, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tools.cli", *map(str, arguments)]
        result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
        assert result.returncode == exit_code, result.stderr
        return result

    return call


@pytest.fixture(scope="module")
def captured(run: Run, folder: Path) -> dict[str, Any]:
    """Summary of the first capture."""
    summary: dict[str, Any] = json.loads(run("capture", folder / "capture.yaml", "--json").stdout)
    return summary


def test_capture_prints_one_document_with_run_and_store(captured: dict[str, Any]) -> None:
    done, store = captured["run"], captured["store"]
    assert done["units_captured"] == store["units_committed"] == store["units_planned"] > 2
    assert (done["units_before"], done["failures"]) == (0, 0)
    assert done["positions"] == store["positions"] > 0
    assert done["bytes"] == store["bytes"]
    assert store["dead_letters"] == {"empty": 1, "malformed": 1}
    assert (store["documents"], store["recorded_documents"]) == (62, 60)
    assert (store["is_complete"], store["manifest"]) == (True, 1)


def test_capture_of_what_is_captured_says_so_and_ends_with_0(captured: dict[str, Any], run: Run, folder: Path) -> None:
    result = run("capture", folder / "capture.yaml")
    assert "nothing was left to do" in result.stdout
    assert "2 dead letters (1 empty, 1 malformed)" in result.stdout
    assert "'logitstore verify" in result.stdout


def test_capture_with_other_settings_is_refused_with_3(captured: dict[str, Any], run: Run, folder: Path) -> None:
    result = run("capture", folder / "capture.yaml", "method.k=4", exit_code=3)
    assert result.stdout == ""
    assert "in the store:     8" in result.stderr
    assert "Traceback" not in result.stderr


def test_train_then_evaluate_on_the_same_records_agree(captured: dict[str, Any], run: Run, folder: Path) -> None:
    report = json.loads(run("train", folder / "train.yaml", "steps=4", "--json").stdout)
    assert (report["steps"], report["interrupted"], report["student"]) == (4, False, str(folder / "run/student"))
    figures = json.loads(
        run(
            "evaluate", report["student"], "--store", captured["store"]["store"], "--held-out-fraction", 0.3, "--json"
        ).stdout
    )
    assert figures["positions"] == report["evaluation"]["positions"] > 0
    assert figures["lm_loss"] == pytest.approx(report["evaluation"]["lm_loss"], rel=1e-5)
    assert figures["bucket_kl"] == pytest.approx(report["evaluation"]["bucket_kl"], rel=1e-5)
    table = run("evaluate", report["student"], "--store", captured["store"]["store"], "--all").stdout
    assert "KL(teacher, student)" in table
    assert "calibration error" in table


def test_capture_of_more_files_extends_the_store_only_when_asked(run: Run, folder: Path) -> None:
    corpus, store = folder / "growing.jsonl", folder / "growing"
    more = folder / "more.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"value_{i} = {i}\n" * 4}) + "\n" for i in range(20)))
    more.write_text("".join(json.dumps({"text": f"more_{i} = {i}\n" * 4}) + "\n" for i in range(10)))
    settings = (folder / "capture.yaml", f"store={store}")
    first = json.loads(run("capture", *settings, f"corpus.files=[{corpus}]", "--json").stdout)["store"]
    both = f"corpus.files=[{corpus}, {more}]"
    refused = run("capture", *settings, both, exit_code=3)
    assert "1 not in the store" in refused.stderr
    assert "--extend" in refused.stderr
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    second = json.loads(run("capture", *settings, both, "--extend", "--json").stdout)
    assert second["run"]["units_before"] == first["units_committed"]
    assert second["store"]["documents"] == first["documents"] + 10
    assert (second["store"]["is_complete"], second["store"]["manifest"]) == (True, 2)
    assert {path: path.read_bytes() for path in before} == before
    assert "nothing was left to do" in run("capture", *settings, both).stdout
    assert json.loads(run("verify", store, "--json").stdout)["problems"] == []
    pinned = json.loads(run("inspect", store, "--manifest", 1, "--json").stdout)
    assert (pinned["positions"], pinned["documents"]) == (first["positions"], first["documents"])
