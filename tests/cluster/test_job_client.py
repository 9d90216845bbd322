"""Following jobs whose head is silent, broken or new; errors of Ray's client in our words."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import aiohttp
import pytest
import requests
from checkout import ROOT
from fake_jobs import ADDRESS, FakeRayClient
from ray.exceptions import AuthenticationError

from cluster.job_client import JobClient
from cluster.submit import JobRequest
from logitstore.errors import ConfigError, OutsideError

GONE = RuntimeError("Request failed with status code 404: Job capture-1 does not exist.")
REQUEST = JobRequest(name="capture-1", entrypoint="true", runtime_env={}, metadata={})


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[..., JobClient]:
    """Function that makes a client of a head that does as it is told, and is in no hurry to wait."""
    monkeypatch.setattr("cluster.job_client._QUIET_SECONDS", 0.01)
    monkeypatch.setattr("cluster.job_client._POLL_SECONDS", 0.0)

    def connect(head: FakeRayClient) -> JobClient:
        monkeypatch.setattr("cluster.job_client._open", lambda address: head)
        return JobClient(ADDRESS)

    return connect


def follow(client: JobClient) -> tuple[str, str]:
    """Log and status of a job that is followed to its end."""
    log: list[str] = []
    job = client.follow("capture-1", log.append)
    return "".join(log), job.status


@pytest.mark.parametrize("error", [aiohttp.ClientError("broken"), ConnectionError("broken"), RuntimeError("closed")])
def test_log_that_breaks_is_picked_up_where_it_stopped(error: Exception, connect: Any) -> None:
    head = FakeRayClient(log=["one\n", "two\n", error, "three\n"], statuses=["RUNNING", "SUCCEEDED"])
    assert follow(connect(head)) == ("one\ntwo\nthree\n", "SUCCEEDED")


def test_log_that_ends_before_the_job_does_is_asked_for_again(connect: Any) -> None:
    assert follow(connect(FakeRayClient(statuses=["RUNNING", "RUNNING", "FAILED"]))) == ("hello\n", "FAILED")


def test_log_that_never_ends_is_left_when_the_job_has_ended(connect: Any) -> None:
    head = FakeRayClient(log=["one\n", 3600.0], statuses=["RUNNING", "RUNNING", "STOPPED"])
    assert follow(connect(head)) == ("one\n", "STOPPED")


def test_new_head_that_does_not_know_the_job_ends_the_following(connect: Any) -> None:
    head = FakeRayClient(log=[ConnectionError("reset")], statuses=[GONE])
    with pytest.raises(OutsideError, match="submit it again, what is committed stays"):
        follow(connect(head))


NOT_LET_IN = [
    AuthenticationError("Unauthorized: Invalid authentication token"),
    aiohttp.WSServerHandshakeError(MagicMock(), (), status=401, message="Invalid response status"),
]


@pytest.mark.parametrize("refusal", NOT_LET_IN)
def test_new_head_that_wants_another_token_ends_the_following_with_what_to_do(refusal: Exception, connect: Any) -> None:
    head = FakeRayClient(log=["one\n", ConnectionError("reset"), refusal], statuses=["RUNNING", refusal])
    with pytest.raises(ConfigError, match=r"wants another token: .* to the new token and submit it again"):
        follow(connect(head))


@pytest.mark.parametrize("refusal", NOT_LET_IN)
def test_follower_with_a_wrong_token_is_told_to_set_one(refusal: Exception, connect: Any) -> None:
    with pytest.raises(ConfigError, match="expected to be let in, found"):
        follow(connect(FakeRayClient(log=[refusal], statuses=[refusal])))


def test_head_that_stays_silent_ends_the_following(connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.job_client._PATIENCE_SECONDS", -1.0)
    head = FakeRayClient(statuses=[requests.ConnectionError("Connection refused")])
    with pytest.raises(OutsideError, match="found nobody there"):
        follow(connect(head))


def test_head_that_is_silent_for_a_while_is_waited_for(connect: Any) -> None:
    head = FakeRayClient(statuses=[requests.ConnectionError("Connection refused"), "RUNNING", "SUCCEEDED"])
    assert follow(connect(head)) == ("hello\n", "SUCCEEDED")


def test_job_whose_acceptance_was_lost_on_the_way_is_started_once(connect: Any) -> None:
    head = FakeRayClient(statuses=["PENDING"])
    head.submit_error = requests.ConnectionError("reset")
    assert connect(head).start(REQUEST) == "capture-1"
    assert len(head.submitted) == 1


def test_job_that_the_head_never_got_is_reported(connect: Any) -> None:
    head = FakeRayClient(statuses=[GONE])
    head.submit_error = requests.ConnectionError("reset by peer")
    with pytest.raises(OutsideError, match="reset by peer"):
        connect(head).start(REQUEST)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (RuntimeError("status code 500: ValueError: Job capture-1 already exists."), ConfigError, "another --name"),
        (ValueError("runtime_env: pip must be a list"), ConfigError, "--runtime-env"),
        (RuntimeError("status code 500: No available agent"), OutsideError, "No available agent"),
    ],
)
def test_job_that_ray_refuses_is_reported(error: Exception, kind: type[Exception], text: str, connect: Any) -> None:
    head = FakeRayClient(statuses=[GONE])
    head.submit_error = error
    with pytest.raises(kind, match=text):
        connect(head).start(REQUEST)


def test_job_that_nobody_knows_is_a_mistake(connect: Any) -> None:
    client = connect(FakeRayClient(statuses=[GONE]))
    with pytest.raises(ConfigError, match="expected a job 'capture-1', found none of that name"):
        client.read("capture-1")


def test_stop_waits_until_the_job_has_ended(connect: Any) -> None:
    head = FakeRayClient(statuses=["RUNNING", "RUNNING", "STOPPED"])
    assert connect(head).stop("capture-1").status == "STOPPED"
    assert head.stopped == ["capture-1"]


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "127.0.0.1"])
def test_address_that_is_no_dashboard_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="expected http://HEAD:8265"):
        JobClient(address)


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_address_on_the_command_line_wins_over_the_environment(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:2")
    with pytest.raises(OutsideError, match=r"http://127\.0\.0\.1:1: expected the head"):
        JobClient("http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("module", "advice"),
    [
        ("requests", "pip install 'ray[default]'"),
        ("aiohttp", "pip install 'ray[default]'"),
        ("ray", "pip install 'logitstore[ray]'"),
    ],
)
def test_python_without_the_job_api_names_what_to_install(module: str, advice: str, tmp_path: Any) -> None:
    code = f"import sys; sys.modules[{module!r}] = None\nfrom tools.cli import main\nmain('submit')"
    command = [sys.executable, "-c", code, "status", "--address", ADDRESS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert advice in result.stderr
    assert "Traceback" not in result.stderr


def test_headers_that_are_no_mapping_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_HEADERS", "xyzzy")
    monkeypatch.setattr("requests.get", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="RAY_JOB_HEADERS") as error:
        JobClient(ADDRESS)
    assert "xyzzy" not in str(error.value)
