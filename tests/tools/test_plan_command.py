"""`logitstore plan`: the arithmetic by itself, the sample it stands on, and both with a tiny teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.settings import ClusterCaptureSettings
from logitstore.corpus.documents import Document
from logitstore.settings import build_settings
from tools.corpus_sample import choose_units, list_corpus, read_text_sample
from tools.estimate import CorpusFigures, ProbeFigures, estimate_capture

CORPUS = CorpusFigures(files=3, stored_bytes=1_000, text_bytes=4_000_000, units=10)


def build_probe(**changes: Any) -> ProbeFigures:
    values: dict[str, Any] = {
        "units": 2,
        "text_bytes": 8_000,
        "documents": 40,
        "dead_letters": 1,
        "tokenized_positions": 2_000,
        "tokenize_seconds": 1.0,
        "scored_positions": 1_000,
        "scored_records": 4,
        "score_seconds": 9.5,
        "row_group_bytes": 100_000,
        "footer_bytes": 5_000,
        "support_entries": 64_000,
        "teacher_loss": 2.0,
        "load_seconds": 36.0,
        "device": "CPU, 1 thread",
    }
    return ProbeFigures.model_validate({**values, **changes})


def test_estimate_goes_by_bytes_of_text() -> None:
    estimate = estimate_capture(CORPUS, build_probe(), actors=1)
    assert estimate.positions == 1_000_000
    assert estimate.bytes_per_position == 100
    assert estimate.store_bytes == 100_000_000 + 10 * 5_000
    assert estimate.dead_letter_share == 0.025
    assert estimate.cost is None


def test_estimate_of_time_counts_tokenizing_scoring_and_loading() -> None:
    estimate = estimate_capture(CORPUS, build_probe(), actors=4, price_per_hour=2.0)
    assert estimate.positions_per_second == pytest.approx(100)
    assert estimate.actor_hours == pytest.approx(10_000 / 3600)
    assert estimate.hours == pytest.approx(2_500 / 3600 + 0.01)
    assert estimate.cost == pytest.approx(2.0 * (10_000 / 3600 + 4 * 0.01))


def test_estimate_never_uses_more_actors_than_units() -> None:
    assert estimate_capture(CORPUS, build_probe(), actors=64).actors == 10


@pytest.mark.parametrize(
    ("num_units", "num_samples", "units"),
    [(1, 8, [0]), (8, 8, list(range(8))), (100, 2, [25, 75]), (1000, 4, [125, 375, 625, 875]), (0, 8, [])],
)
def test_choose_units_spreads_them_over_the_corpus(num_units: int, num_samples: int, units: list[int]) -> None:
    assert choose_units(num_units, num_samples) == units


def build_capture(folder: Path, files: list[str], **changes: Any) -> ClusterCaptureSettings:
    values = {
        "store": str(folder / "store"),
        "corpus": {"files": [str(folder / name) for name in files]},
        "teacher": {"model": "none", "device": "cpu"},
        "unit_bytes": 1_000,
        **changes,
    }
    return build_settings(ClusterCaptureSettings, values, where="test")


def write_json_lines(path: Path, num_documents: int) -> int:
    lines = [json.dumps({"name": f"document {i}", "text": "x" * 80}) for i in range(num_documents)]
    path.write_text("\n".join(lines) + "\n")
    return path.stat().st_size


def test_sample_of_json_lines_stands_for_the_range_it_was_read_from(tmp_path: Path) -> None:
    num_bytes = write_json_lines(tmp_path / "a.jsonl", 100)
    settings = build_capture(tmp_path, ["a.jsonl"])
    corpus = list_corpus(settings)
    assert sum(corpus.text_bytes) == num_bytes
    samples = [read_text_sample(corpus, unit, 1_000_000, settings) for unit in range(len(corpus.units))]
    assert sum(sample.text_bytes for sample in samples) == num_bytes
    assert sum(len(sample.documents) for sample in samples) == 100
    part = read_text_sample(corpus, 3, 300, settings)
    assert part.text_bytes == 300
    assert 2 <= len(part.documents) <= 3


def test_sample_of_text_files_takes_whole_files_until_there_is_enough(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(name * 200)
    settings = build_capture(tmp_path, ["*.txt"])
    corpus = list_corpus(settings)
    sample = read_text_sample(corpus, 0, 300, settings)
    assert [document.text[0] for document in sample.documents if isinstance(document, Document)] == ["a", "b"]
    assert sample.text_bytes == 400


def test_sample_of_parquet_counts_the_text_it_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["y" * 100] * 50, "other": [0] * 50}), tmp_path / "a.parquet")
    settings = build_capture(tmp_path, ["a.parquet"])
    sample = read_text_sample(list_corpus(settings), 0, 450, settings)
    assert (len(sample.documents), sample.text_bytes) == (5, 500)


@pytest.fixture
def capture_file(tmp_path: Path, teacher_folder: Path) -> Path:
    lines = [json.dumps({"text": f"def value_{i}(path):\n    return read(path, {i})\n" * 3}) for i in range(60)]
    (tmp_path / "corpus.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n")
    values = {
        "store": str(tmp_path / "store"),
        "corpus": {"files": [str(tmp_path / "corpus.jsonl")]},
        "teacher": {"model": str(teacher_folder), "device": "cpu"},
        "method": {"k": 8},
        "sequences": {"length": 64},
        "unit_bytes": 2_000,
        "actors": {"count": 2, "cpus": 1},
    }
    path = tmp_path / "capture.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_plan_whose_sample_is_the_corpus_is_exact_and_leaves_no_store(
    capture_file: Path, teacher_folder: Path, logitstore: Any
) -> None:
    changes = ("unit_bytes=1000000", "--probe-positions", 1_000_000)
    plan = logitstore.json("plan", capture_file, *changes, "--price-per-hour", 3)
    corpus, probe, estimate = plan["corpus"], plan["probe"], plan["estimate"]
    num_bytes = (capture_file.parent / "corpus.jsonl").stat().st_size
    assert (corpus["files"], corpus["units"]) == (1, 1)
    assert corpus["text_bytes"] == corpus["stored_bytes"] == probe["text_bytes"] == num_bytes
    assert (probe["documents"], probe["dead_letters"]) == (61, 1)
    assert estimate["positions"] == probe["tokenized_positions"] == probe["scored_positions"]
    assert estimate["store_bytes"] == probe["row_group_bytes"] + probe["footer_bytes"]
    assert probe["support_entries"] == 8 * probe["scored_positions"]
    assert (estimate["actors"], probe["device"]) == (1, "CPU, 1 thread")
    assert estimate["cost"] > 0
    assert not (capture_file.parent / "store").exists()


def test_plan_probes_about_as_many_positions_as_asked_and_says_what_is_measured(
    capture_file: Path, logitstore: Any
) -> None:
    plan = logitstore.json("plan", capture_file, "--probe-positions", 256)
    assert plan["probe"]["units"] == 4
    assert 256 <= plan["probe"]["scored_positions"] < 2 * 256
    stdout, _ = logitstore("plan", capture_file, "--probe-positions", 256, "--price-per-hour", 3)
    for name, kind in (("files", "listed"), ("one actor", "measured"), ("store", "extrapolated"), ("cost", "extrap")):
        assert any(line.startswith(name) and kind in line for line in stdout.splitlines()), name


def test_plan_of_a_corpus_without_a_document_ends_with_2(capture_file: Path, logitstore: Any) -> None:
    (capture_file.parent / "corpus.jsonl").write_text("\n\n\n")
    _, stderr = logitstore("plan", capture_file, exit_code=2)
    assert "expected usable documents" in stderr
