"""A capture with a vLLM engine whose memory is too small, for a chunk of logits and for a document."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from capture_processes import PATIENCE_SECONDS, Processes
from vllm_engines import ENVIRONMENT, build_vllm_settings
from vllm_models import save_vllm_model

from tests.cluster.faults.fault_captures import check_whole, finish, make_capture
from tests.cluster.faults.fault_cluster import HOOKS
from tests.cluster.faults.hooks.planned_faults import FOLDER, Fault, FaultFolder

pytest.importorskip("vllm", reason="vLLM is not installed: see docs/vllm.md")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    """Captures whose engines live in the actors' own processes, sooner started, with the hooks of faults."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    processes = Processes(tmp_path)
    processes.environment["PYTHONPATH"] = os.pathsep.join([str(HOOKS), processes.environment["PYTHONPATH"]])
    processes.environment[FOLDER] = str(tmp_path / "faults")
    yield processes
    processes.kill_all()


def test_document_that_the_engine_dies_of_costs_its_unit_nothing_else(processes: Processes, tmp_path: Path) -> None:
    teacher = save_vllm_model("llama", tmp_path / "teacher")
    capture = make_capture(
        tmp_path,
        num_documents=18,
        num_units=6,
        repeats=20,
        marked=frozenset({7}),
        teacher_folder=teacher,
        teacher=build_vllm_settings(teacher).model_dump(exclude_none=True),
        sequences={"length": 100},
        actors={"count": 1, "cpus": 1},
    )
    faults = FaultFolder(tmp_path / "faults")
    faults.plan(
        Fault(place="scoring", kind="out_of_memory", sequences=20, times=2),
        Fault(place="scoring", kind="out_of_memory", token_id=capture.marker_id, times=None),
    )
    summary, log = finish(processes.start(capture.settings), 3 * PATIENCE_SECONDS)
    assert faults.count_strikes() == 2  # these cost a chunk, scored in halves
    assert summary["run"]["failures"] == 0
    # In company, alone, and alone again.
    assert summary["run"]["actor_losses"] == log.count("engine lost with unit ") == 3
    assert check_whole(capture, dead=frozenset({7}), reason="engine_died") == set()
