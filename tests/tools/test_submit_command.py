"""`logitstore submit` beside a head that does as a test says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_jobs import ADDRESS, FakeRayClient

from logitstore import __version__
from logitstore.errors import ConfigError
from tools.submitted import check_machine

SETTINGS = "{store: 's3://bucket/store', corpus: {files: [x]}, teacher: {model: m}}"


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "capture.yaml"
    path.write_text(SETTINGS)
    return path


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeRayClient], FakeRayClient]:
    """Function that puts a head at the address of every command."""
    monkeypatch.setattr("cluster.job_client._POLL_SECONDS", 0.0)

    def use(head: FakeRayClient) -> FakeRayClient:
        monkeypatch.setattr("cluster.job_client._open", lambda address: head)
        return head

    return use


@pytest.mark.parametrize("exit_code", [0, 3, 137])
def test_submit_passes_the_log_on_and_ends_like_the_job(
    exit_code: int, use: Any, settings: Path, logitstore: Any
) -> None:
    head = use(FakeRayClient(log=["a line\n"], statuses=["FAILED" if exit_code else "SUCCEEDED"], exit_code=exit_code))
    arguments = ("submit", "capture", settings, "--address", ADDRESS, "--name", "capture-7")
    stdout, stderr = logitstore(*arguments, "method.k=3", "--", "--extend", exit_code=exit_code)
    assert f"job capture-7 on {ADDRESS}\na line\n" in stderr
    assert "a line" not in stdout
    assert "s3://bucket/store" in stdout
    [request] = head.submitted
    assert request["entrypoint"].endswith("capture capture.yaml --address auto method.k=3 --extend")


def test_submit_prints_one_document_and_no_log_when_asked(use: Any, settings: Path, logitstore: Any) -> None:
    use(FakeRayClient(log=["a line\n"]))
    arguments = ("submit", "capture", settings, "--address", ADDRESS, "--name", "capture-7", "--quiet")
    report = logitstore.json(*arguments)
    assert (report["job"], report["status"], report["exit_code"]) == ("capture-7", "SUCCEEDED", 0)
    assert logitstore(*arguments)[1] == ""


def test_submit_without_waiting_returns_while_the_job_runs(use: Any, settings: Path, logitstore: Any) -> None:
    use(FakeRayClient(log=[RuntimeError("nobody asks for the log")], statuses=["PENDING"]))
    report = logitstore.json("submit", "capture", settings, "--address", ADDRESS, "--no-wait")
    assert (report["status"], report["exit_code"]) == ("PENDING", None)


@pytest.mark.parametrize("verb", [["capture", "settings"], ["follow", "capture-7"]], ids=lambda verb: verb[0])
def test_interrupted_watching_says_that_the_job_goes_on(
    verb: list[str], use: Any, settings: Path, logitstore: Any
) -> None:
    use(FakeRayClient(log=[KeyboardInterrupt()], statuses=["RUNNING"]))
    name = {"capture": ["--name", "capture-7"], "follow": []}[verb[0]]
    argument = settings if verb[1] == "settings" else verb[1]
    stdout, stderr = logitstore("submit", verb[0], argument, *name, "--address", ADDRESS, exit_code=130)
    assert stdout == ""
    assert "job capture-7 goes on" in stderr
    assert f"logitstore submit stop capture-7 --address {ADDRESS}" in stderr
    assert "the same command" not in stderr


def test_follow_of_a_stopped_job_ends_with_4(use: Any, logitstore: Any) -> None:
    use(FakeRayClient(statuses=["STOPPED"]))
    _, stderr = logitstore("submit", "follow", "capture-7", "--address", ADDRESS, exit_code=4)
    assert "found that it was stopped; submit it again to go on" in stderr


def test_status_lists_jobs_and_shows_one(use: Any, logitstore: Any) -> None:
    use(FakeRayClient())
    lines = logitstore("submit", "status", "--address", ADDRESS)[0].splitlines()
    assert [line.split()[0] for line in lines if "capture-" in line] == ["capture-1", "capture-2"]
    assert "succeeded" in lines[2]
    one = logitstore("submit", "status", "capture-1", "--address", ADDRESS)[0]
    assert "1 min 1 s" in one
    assert "1970-01-01 00:16:40 UTC" in one
    assert [job["job"] for job in logitstore.json("submit", "status", "--address", ADDRESS)] == [
        "capture-1",
        "capture-2",
    ]


def test_stop_asks_the_head_and_waits(use: Any, logitstore: Any) -> None:
    head = use(FakeRayClient(statuses=["RUNNING", "STOPPED"]))
    assert logitstore.json("submit", "stop", "capture-7", "--address", ADDRESS)["status"] == "STOPPED"
    assert head.stopped == ["capture-7"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--env", "NAME"], "expected NAME=VALUE"),
        (["--env", "HF_TOKEN=xyzzy"], "env_vars.HF_TOKEN"),
        (["--secret", "HF_TOKEN=xyzzy"], "give the name alone"),
        (["--runtime-env", "nowhere.yaml"], "nowhere.yaml"),
        (["--working-dir", "nowhere"], "working_dir"),
        (["store=runs/store"], "outlives the job"),
    ],
)
def test_submission_that_cannot_work_is_refused_before_anything_is_sent(
    options: list[str], text: str, use: Any, settings: Path, logitstore: Any
) -> None:
    head = use(FakeRayClient())
    stdout, stderr = logitstore("submit", "capture", settings, "--address", ADDRESS, *options, exit_code=2)
    assert stdout == ""
    assert text in stderr
    assert "xyzzy" not in stderr
    assert head.submitted == []


def test_machine_with_the_release_and_the_secrets_runs_the_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "xyzzy")
    arguments = ["--version", __version__, "--secret", "A_TOKEN", "capture", "capture.yaml", "--secret"]
    assert check_machine(arguments) == ["capture", "capture.yaml", "--secret"]


def test_machine_with_another_release_is_refused_with_both_sides() -> None:
    with pytest.raises(ConfigError, match=rf"submitted: 9\.9\n  on the cluster: +{__version__}"):
        check_machine(["--version", "9.9", "capture"])


def test_machine_without_a_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "xyzzy")
    monkeypatch.setenv("C_TOKEN", "")
    with pytest.raises(ConfigError, match="to have B_TOKEN, C_TOKEN in their environment"):
        check_machine(["--secret", "A_TOKEN", "--secret", "B_TOKEN", "--secret", "C_TOKEN", "capture"])
