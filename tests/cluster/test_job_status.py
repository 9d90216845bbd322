"""What a job's end means for whoever waited."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.job_status import Job, build_end_error, read_job
from logitstore.errors import ConfigError, OutsideError


def build_job(**changes: Any) -> Job:
    details = {
        "submission_id": "capture-1",
        "job_id": "01000000",
        "status": "FAILED",
        "driver_exit_code": None,
        "error_type": None,
        "message": None,
        "entrypoint": "exec python",
        "metadata": None,
        "start_time": 1500,
        "end_time": 0,
    }
    return read_job(SimpleNamespace(**{**details, **changes}))


@pytest.mark.parametrize(("found", "expected"), [(None, None), (0, 0), (3, 3), (-9, 137)])
def test_exit_code_of_a_job_is_that_of_a_shell(found: int | None, expected: int | None) -> None:
    assert build_job(driver_exit_code=found).exit_code == expected


def test_times_of_a_job_are_seconds() -> None:
    job = build_job(end_time=2500)
    assert (job.started, job.ended) == (1.5, 2.5)
    assert build_job().ended is None


@pytest.mark.parametrize(("status", "has_ended"), [("PENDING", False), ("RUNNING", False), ("STOPPED", True)])
def test_job_has_ended_when_its_status_says_so(status: str, has_ended: bool) -> None:
    assert build_job(status=status).has_ended is has_ended


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"status": "STOPPED"}, OutsideError, "submit it again"),
        ({"error_type": "RUNTIME_ENV_SETUP_FAILURE", "message": "no such package"}, ConfigError, "no such package"),
        ({"error_type": "JOB_SUPERVISOR_ACTOR_DIED", "message": "gone"}, OutsideError, "JOB_SUPERVISOR_ACTOR_DIED"),
        (
            {"driver_exit_code": 1, "message": "No module named tools.submitted"},
            ConfigError,
            "--package",
        ),
    ],
)
def test_end_that_says_nothing_itself_is_explained(changes: dict[str, Any], kind: type[Exception], text: str) -> None:
    error = build_end_error(build_job(**changes))
    assert type(error) is kind
    assert text in str(error)


@pytest.mark.parametrize("changes", [{"status": "SUCCEEDED", "driver_exit_code": 0}, {"driver_exit_code": 3}])
def test_end_with_an_exit_code_speaks_for_itself(changes: dict[str, Any]) -> None:
    assert build_end_error(build_job(**changes)) is None
