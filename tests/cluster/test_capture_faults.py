"""Captures on a real Ray whose processes get killed: every unit committed once, nothing lost, nothing left running."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from capture_processes import PATIENCE_SECONDS, Processes, wait_until
from tiny_models import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitstore.store.commit import COMMITS, DATA, list_units, read_commit, read_quarantine
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.verify import verify_store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NUM_DOCUMENTS = 240


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(tmp_path)
    yield processes
    processes.kill_all()


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """A capture of 60 units with two actors."""
    teacher = save_model("llama", tmp_path / "teacher")
    documents = [{"text": f"value_{i} = read({i})\n" * 200} for i in range(NUM_DOCUMENTS)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    values = {
        "store": str(tmp_path / "store"),
        "corpus": {"files": [str(tmp_path / "corpus.jsonl")]},
        "teacher": {"model": str(teacher), "device": "cpu"},
        "method": {"k": 8},
        "sequences": {"length": 64},
        "unit_bytes": (tmp_path / "corpus.jsonl").stat().st_size // 60,
        "actors": {"count": 2, "cpus": 0.5},
    }
    path = tmp_path / "capture.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def count_commits(settings: Path) -> int:
    return len(list_units(StoreFiles(str(settings.parent / "store")), COMMITS))


def check_store_is_whole(settings: Path) -> None:
    files = StoreFiles(str(settings.parent / "store"))
    store = LogitStore.open(files.url)
    num_units = len(store.plan.build_unit_table())
    assert num_units > 40
    assert list_units(files, COMMITS) == list(range(num_units))
    assert store.manifest.units.tolist() == list(range(num_units))
    statistics = store.compute_statistics()
    assert statistics.documents == statistics.recorded_documents == NUM_DOCUMENTS
    verification = verify_store(files)
    assert verification.problems == ()
    assert verification.records == len(store)


def list_unreferenced(settings: Path) -> set[str]:
    """Data files that no commit names: garbage of attempts that were killed, or that lost."""
    files = StoreFiles(str(settings.parent / "store"))
    stored = {f"{DATA}/{file.name}" for file in files.list(DATA)}
    return stored - {read_commit(files, unit).file for unit in list_units(files, COMMITS)}


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    summary: dict[str, Any] = json.loads(output)
    return summary


def test_capture_whose_driver_and_then_an_actor_are_killed_ends_whole(processes: Processes, settings: Path) -> None:
    driver = processes.start(settings)
    wait_until(lambda: count_commits(settings) >= 3 or driver.poll() is not None, "the first commits")
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    after_kill = count_commits(settings)
    assert after_kill >= 3

    # What the first driver left running may commit a little longer: only an actor of the second one will do.
    second = processes.start(settings, run="-second")
    wait_until(
        lambda: bool(processes.find("ray::CaptureActor.capture", run="-second")) or second.poll() is not None,
        "an actor of the second driver in the middle of a unit",
    )
    os.kill(processes.find("ray::CaptureActor", run="-second")[0], signal.SIGKILL)
    run = finish(second)["run"]
    assert run["actor_losses"] >= 1
    assert run["failures"] == 0
    assert run["units_before"] >= after_kill
    check_store_is_whole(settings)

    done = finish(processes.start(settings))["run"]
    assert (done["units_before"], done["units_captured"]) == (count_commits(settings), 0)
    check_store_is_whole(settings)
    wait_until(lambda: not processes.find(), "all processes to end")


def test_capture_rerun_with_other_settings_is_refused_with_both_sides(processes: Processes, settings: Path) -> None:
    finish(processes.start(settings))
    process = processes.start(settings, "method.k=4")
    output, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, output) == (3, "")
    assert "in the store:     8" in errors
    assert "in this capture:  4" in errors
    check_store_is_whole(settings)


def test_two_drivers_at_once_commit_every_unit_once(processes: Processes, settings: Path) -> None:
    both = [processes.start(settings) for _ in range(2)]
    runs = [finish(process)["run"] for process in both]
    check_store_is_whole(settings)
    # Neither driver lost an actor, so each commit was reported by the one that won it.
    assert sum(run["units_captured"] for run in runs) == count_commits(settings)
    assert sum(run["documents"] for run in runs) == NUM_DOCUMENTS
    assert [(run["failures"], run["actor_losses"]) for run in runs] == [(0, 0), (0, 0)]
    assert list_unreferenced(settings) == set()


@pytest.mark.parametrize("place", ["loading", "capturing"])
def test_capture_whose_user_is_in_a_hurry_to_stop_it_leaves_nobody_behind(
    processes: Processes, settings: Path, place: str
) -> None:
    """Ctrl-C goes to all that a terminal shows the output of, Ray's own processes as well; here it comes twice."""
    driver = processes.start(settings, has_terminal=True)

    def is_there() -> bool:
        has_actor = bool(processes.find("ray::CaptureActor"))
        return has_actor if place == "loading" else (settings.parent / "store").exists() and count_commits(settings) > 2

    wait_until(lambda: is_there() or driver.poll() is not None, place)
    os.killpg(driver.pid, signal.SIGINT)
    wait_until(lambda: not processes.find("ray::CaptureActor") or driver.poll() is not None, "actors to end")
    with contextlib.suppress(ProcessLookupError):  # it may have been quick enough
        os.killpg(driver.pid, signal.SIGINT)
    _, errors = driver.communicate(timeout=PATIENCE_SECONDS)
    assert driver.returncode in (130, -signal.SIGINT), errors
    wait_until(lambda: not processes.find(), "all processes to end")


def poison(teacher: Path, text: str) -> None:
    """Give a teacher logits that are not numbers wherever a text has stood."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer(text)["input_ids"]] = torch.nan
    model.save_pretrained(teacher)


def put_poison(corpus: Path, lines: range) -> None:
    """Begin the texts of some lines with what the teacher is poisoned by, without changing where units are cut."""
    documents = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    for i in lines:
        documents[i] = "Ω" + documents[i][6:]  # in JSON as long as before: six characters of ASCII
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def test_document_that_makes_the_teacher_fail_is_a_dead_letter_and_its_unit_survives(
    processes: Processes, settings: Path, tmp_path: Path
) -> None:
    poison(tmp_path / "teacher", "Ω")
    put_poison(tmp_path / "corpus.jsonl", range(100, 102))
    finish(processes.start(settings))
    files = StoreFiles(str(tmp_path / "store"))
    statistics = LogitStore.open(files.url).compute_statistics()
    assert statistics.documents == NUM_DOCUMENTS
    assert statistics.recorded_documents == NUM_DOCUMENTS - 2
    assert statistics.dead_letters == {"invalid_signal": 2}
    letters = [letter for unit in list_units(files, COMMITS) for letter in read_commit(files, unit).dead_letters]
    assert [letter.detail.split(",")[0] for letter in letters] == ["line 101", "line 102"]
    assert all("expected finite logits of the teacher, found NaN" in letter.detail for letter in letters)
    assert not read_quarantine(files)
    assert verify_store(files).is_clean


def test_unit_that_always_fails_is_set_aside_and_the_others_are_captured(
    processes: Processes, settings: Path, tmp_path: Path
) -> None:
    poison(tmp_path / "teacher", "Ω")
    put_poison(tmp_path / "corpus.jsonl", range(100, 107))  # all of one unit of four, and parts of its neighbours
    process = processes.start(settings)
    output, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 3, errors
    summary = json.loads(output)
    files = StoreFiles(str(tmp_path / "store"))
    [entry] = read_quarantine(files)
    assert "logits" in entry.error
    assert ", in capture\n" in entry.error  # the actor's traceback
    assert entry.attempts == 3
    assert summary["run"]["failures"] >= 3
    num_units = len(LogitStore.open(files.url).plan.build_unit_table())
    assert set(list_units(files, COMMITS)) == set(range(num_units)) - {entry.unit}
    assert verify_store(files).is_clean
    assert str(entry.unit) in errors
