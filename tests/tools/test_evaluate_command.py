"""`logitstore evaluate`: one student or several, on chosen records, as tables, JSON and a page."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import ROOT
from judged_stores import build_labelled_store
from taught_stores import build_model
from tiny_models import save_model

from logitstore.errors import ConfigError
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import write_manifest
from tools.evaluate import name_students
from tools.evaluation_report import EvaluationReport, build_evaluation_report
from tools.student_results import StudentResult, build_comparison, list_compared
from trainer.evaluate import evaluate_records
from trainer.evaluation import EntropyFigures, Evaluation, GroupFigures
from trainer.harness import TaskFigure, list_figures, run_harness

FIGURES: dict[str, Any] = {
    "positions": 10,
    "lm_loss": 0.7,
    "perplexity": 2.0,
    "teacher_lm_loss": 0.6,
    "bucket_kl": 0.4,
    "overlap": 0.8,
    "top1_agreement": 0.9,
}
BINS: dict[str, Any] = {"bin_positions": (1,), "bin_confidence": (0.5,), "bin_accuracy": (0.5,)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LogitStore:
    return build_labelled_store(tmp_path_factory.mktemp("judged"))


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs' folders, the first with metrics of its training."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("first", "second")):
        build_model(seed=seed).save_pretrained(folder / name / "student")
    lines = [{"step": step, "train/cross_entropy": 5 - step / 10, "held_out/lm_loss": 5.5} for step in (10, 20)]
    (folder / "first/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "first/student", folder / "second/student"


def test_one_student_shows_its_figures_and_those_of_every_part(
    students: tuple[Path, Path], store: LogitStore, logitstore: Any
) -> None:
    table, _ = logitstore("evaluate", students[0], "--store", store.url, "--all", "--device", "cpu")
    for text in ("perplexity", "calibration error", "the teacher's", "By source", "books", "By label", "(none)"):
        assert text in table
    assert re.search(r"^3\.5 to 4 +\d+ +\d+\.\d% +\d", table, re.MULTILINE)


def test_json_of_one_student_has_parts_that_add_up_to_the_whole(
    students: tuple[Path, Path], store: LogitStore, logitstore: Any
) -> None:
    found = logitstore.json("evaluate", students[0], "--store", store.url, "--all", "--micro-batch-tokens", 30)
    assert (found["name"], found["student"]) == ("first", str(students[0]))
    assert found["positions"] == store.compute_statistics().taught_positions
    for parts in ("by_source", "by_label", "by_entropy"):
        assert sum(part["positions"] for part in found[parts]) == found["positions"]


def test_several_students_stand_side_by_side_as_each_would_alone(
    students: tuple[Path, Path], store: LogitStore, logitstore: Any
) -> None:
    arguments = ("--store", store.url, "--held-out-source", "code")
    both = logitstore.json("evaluate", *students, *arguments)["students"]
    assert both == [logitstore.json("evaluate", student, *arguments) for student in students]
    table, _ = logitstore("evaluate", *students, *arguments)
    [line] = [line for line in table.splitlines() if line.startswith("perplexity")]
    assert re.findall(r"[\d,]+\.\d\d", line) == [f"{student['perplexity']:,.2f}" for student in both]
    assert "first" in table
    assert "second" in table


def test_conditions_choose_among_the_records(students: tuple[Path, Path], store: LogitStore, logitstore: Any) -> None:
    arguments = ("evaluate", students[0], "--store", store.url, "--all")
    found = logitstore.json(*arguments, "--where", "{labels: [de], sources: [code]}")
    assert [part["name"] for part in found["by_source"]] == ["code"]
    assert [part["name"] for part in found["by_label"]] == ["de"]
    assert 0 < found["positions"] < logitstore.json(*arguments)["positions"]


def test_store_that_grows_meanwhile_is_reported_as_it_was_evaluated(
    students: tuple[Path, Path], tmp_path: Path, logitstore: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing, page = build_labelled_store(tmp_path), tmp_path / "page.html"

    def grow_and_evaluate(*arguments: Any, **options: Any) -> Evaluation:
        write_manifest(StoreFiles(growing.url), growing.plan.compute_fingerprint(), without=[3])
        return evaluate_records(*arguments, **options)

    monkeypatch.setattr("trainer.evaluate.evaluate_records", grow_and_evaluate)
    found = logitstore.json("evaluate", students[0], "--store", growing.url, "--all", "--report", page)
    assert LogitStore.open(growing.url).manifest_number == 2
    assert found["manifest"] == 1
    assert re.search(r"manifest</dt><dd>1<", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--where", "labels"], "expected conditions such as"),
        (["--where", "{colour: [red]}"], "known keys: sources, labels"),
        (["--micro-batch-tokens", "9", "--micro-batch-sequences", "2"], "expected this or micro_batch_sequences"),
        (["--report", "nowhere/page.html"], "expected a folder to write it in"),
        (["--harness-folder", "."], "found no --harness"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_that_make_no_sense_are_refused_before_anything_is_read(
    options: list[str], message: str, logitstore: Any
) -> None:
    stdout, stderr = logitstore("evaluate", "student", "--store", "nowhere", "--all", *options, exit_code=2)
    assert stdout == ""
    assert message in stderr


def test_report_is_no_reason_to_replace_what_is_no_page(tmp_path: Path, logitstore: Any) -> None:
    notes = tmp_path / "notes.html"
    notes.write_text("precious")
    _, stderr = logitstore("evaluate", "s", "--store", "nowhere", "--all", "--report", notes, exit_code=2)
    assert "expected a new file or an earlier page" in stderr
    assert notes.read_text() == "precious"


def test_report_of_two_students_has_every_chart_and_needs_nothing_from_anywhere(
    students: tuple[Path, Path], store: LogitStore, logitstore: Any, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    for _ in range(2):  # an earlier page is replaced
        _, stderr = logitstore("evaluate", *students, "--store", store.url, "--all", "--report", page)
        assert str(page) in stderr
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r'aria-label="([^:"]+)', text)
    assert titles == [
        "Calibration",
        "Agreement by entropy",
        "Distance to the teacher by entropy",
        "Perplexity by source",
        "Distance to the teacher by source",
        "Perplexity by label",
        "Distance to the teacher by label",
        "Loss on the text, training batches",
        "Loss on the text, held out",
    ]
    assert not re.search(r"https?:|<script|<img|url\(", text)
    assert "nan" not in text.replace("nano", "")


def test_report_calls_a_distance_what_it_is() -> None:
    drawn = {"bucket_kl": None, "overlap": None, "top1_agreement": None, "kl_estimate": 0.5}
    pages = {}
    for kind, known in {"kept": {}, "given": {"top1_agreement": None}, "drawn": drawn}.items():
        group = {**FIGURES, **known}
        evaluation = Evaluation(
            **group,
            **BINS,
            calibration_error=1.0,
            by_source=tuple(GroupFigures(name=name, **group) for name in "ab"),
            by_entropy=(EntropyFigures(start=0.0, stop=0.5, **group),),
        )
        students = (StudentResult(name="s", evaluation=evaluation, curves=()),)
        data = EvaluationReport(title="t", store="s", teacher="m", facts={}, students=students)
        pages[kind] = build_evaluation_report(data)
    for kind in ("kept", "given"):
        assert "estimate" not in pages[kind]
        assert "bucket KL to the teacher in nats" in pages[kind]
        assert "a lower bound of the KL over the whole vocabulary" in pages[kind]
    assert "Bucket KL to the teacher, nats, by the teacher&#x27;s entropy." in pages["given"]
    assert "KL estimated from draws to the teacher, nats, by the teacher&#x27;s entropy." in pages["drawn"]
    assert "an unbiased estimate of the KL(teacher ‖ student) over the whole vocabulary" in pages["drawn"]
    assert "ucket KL" not in pages["drawn"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a/student"], ["a"]),
        (["runs/a/student", "runs/b/student"], ["a", "b"]),
        (["x/a/student", "y/a/student"], ["x/a", "y/a"]),
        (["student"], ["student"]),
        (["Qwen/Qwen3-0.6B", "runs/a"], ["Qwen3-0.6B", "a"]),
    ],
)
def test_name_students_is_as_short_as_tells_them_apart(paths: list[str], names: list[str]) -> None:
    assert name_students(paths) == names


def test_student_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="give each once"):
        name_students(["a", "b", "a"])


def test_figures_of_the_harness_leave_out_what_is_no_metric() -> None:
    values = {
        "alias": "t",
        "sample_len": 2,
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "f1,strict": 1,
        "f1_stderr,strict": "N/A",
    }
    found = list_figures({"results": {"t": values}, "n-samples": {"t": {"effective": 2}}})
    assert found == [
        TaskFigure(task="t", metric="acc", value=0.5, standard_error=0.1, documents=2),
        TaskFigure(task="t", metric="f1,strict", value=1.0, standard_error=None, documents=2),
    ]


def test_harness_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"expected the package lm_eval.*\n  pip install 'logitstore\[harness\]'"):
        run_harness("student", ["arc_easy"])


TASK = {
    "task": "capitals",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_harness_runs_a_task_of_a_local_file(tmp_path: Path) -> None:
    """In a process with a home of its own: the harness keeps a cache of data there."""
    save_model("llama", tmp_path / "student")
    questions = [
        {"question": f"The capital of {land} is", "choices": ["Paris", "Rome"], "answer": i}
        for i, land in enumerate(("France", "Italy"))
    ]
    (tmp_path / "capitals.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    data = {"data_files": {"test": str(tmp_path / "capitals.jsonl")}}
    (tmp_path / "capitals.yaml").write_text(yaml.safe_dump({**TASK, "dataset_kwargs": data}))
    code = (
        "import json, sys\n"
        "from dataclasses import asdict\n"
        "from trainer.harness import run_harness\n"
        "found = run_harness(sys.argv[1], ['capitals'], task_folder=sys.argv[2], device='cpu')\n"
        "print(json.dumps([asdict(figure) for figure in found]))\n"
        "run_harness(sys.argv[1], ['unheard-of'], task_folder=sys.argv[2], device='cpu')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "student"), str(tmp_path)],
        env={
            **os.environ,
            "HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    [figure] = json.loads(done.stdout.splitlines()[-1])
    assert (figure["task"], figure["metric"], figure["documents"]) == ("capitals", "acc", 2)
    assert figure["value"] in (0.0, 0.5, 1.0)
    assert "ConfigError: harness: expected tasks" in done.stderr


def test_students_of_different_tokens_are_compared_by_the_text_alone() -> None:
    same = {"overlap": None, "top1_agreement": None, "bucket_kl": None, "calibration_error": 1.0}
    evaluations = [
        Evaluation(positions=n, lm_loss=n / 10, perplexity=2.0, teacher_lm_loss=None, bits_per_byte=b, **same, **BINS)
        for n, b in ((10, 1.25), (20, 1.5))
    ]
    compared = {label: do_compare for label, _, _, _, do_compare in list_compared(evaluations)}
    assert compared["bits per byte of the text"]
    assert not compared["LM loss (nats per token)"]
    assert "KL to the teacher (nats)" not in compared
    results = [StudentResult(name=str(i), evaluation=e, curves=()) for i, e in enumerate(evaluations)]
    page = build_comparison(results, "here")
    assert re.findall(r"<td class=best>(.*?)</td>", page) == ["1.2500"]
