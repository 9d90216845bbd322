"""Notices of clouds that a machine will be taken away, against a server that answers as theirs do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
from ray.exceptions import RaySystemError

from cluster import preemption
from cluster.preemption import Cloud, find_notice

EVENT = '{"DocumentIncarnation": 1, "Events": [{"EventId": "1", "EventType": "%s", "ResourceType": "VirtualMachine"}]}'
ACTION = '{"action": "terminate", "time": "2026-11-22T20:00:00Z"}'
INSTANCE_ACTION = "/latest/meta-data/spot/instance-action"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
SCHEDULED = "/metadata/scheduledevents?api-version=2020-07-01"
NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"


class Metadata(BaseHTTPRequestHandler):
    """Answers what a test says, to those who ask as the cloud's manual tells."""

    answers: ClassVar[dict[str, str]] = {}

    def do_PUT(self) -> None:
        has_header = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds") is not None
        self._answer(200 if self.path == "/latest/api/token" and has_header else 400, "a-token")

    def do_GET(self) -> None:
        headers = {
            INSTANCE_ACTION: ("X-aws-ec2-metadata-token", "a-token"),
            PREEMPTED: ("Metadata-Flavor", "Google"),
            SCHEDULED: ("Metadata", "true"),
            NAME: ("Metadata", "true"),
        }
        name, value = headers[self.path]
        if self.headers.get(name) != value:
            self._answer(401, "")
        elif self.path in self.answers:
            self._answer(200, self.answers[self.path])
        else:
            self._answer(404, "")

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("cloud", "path", "answer", "seconds"),
    [
        ("aws", INSTANCE_ACTION, ACTION, 120.0),
        ("aws", INSTANCE_ACTION, None, None),
        ("gcp", PREEMPTED, "TRUE", 30.0),
        ("gcp", PREEMPTED, "FALSE", None),
        ("azure", SCHEDULED, EVENT % "Preempt", 30.0),
        ("azure", SCHEDULED, EVENT % "Reboot", None),
    ],
)
def test_notice_of_a_cloud_is_found_and_nothing_else_is_taken_for_one(
    address: str, monkeypatch: pytest.MonkeyPatch, cloud: Cloud, path: str, answer: str | None, seconds: float | None
) -> None:
    monkeypatch.setattr(Metadata, "answers", {} if answer is None else {path: answer})
    assert find_notice(cloud, address) == seconds


@pytest.mark.parametrize(("resources", "seconds"), [(["gpus_3"], None), (["gpus_3", "gpus_1"], 30.0)])
def test_notice_to_another_machine_of_an_azure_scale_set_is_none(
    address: str, monkeypatch: pytest.MonkeyPatch, resources: list[str], seconds: float | None
) -> None:
    notice = {"Events": [{"EventType": "Preempt", "Resources": resources}]}
    monkeypatch.setattr(Metadata, "answers", {SCHEDULED: json.dumps(notice), NAME: "gpus_1"})
    assert find_notice("azure", address) == seconds


def test_notice_is_passed_on_again_when_ray_did_not_hear_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    has_heard = threading.Event()

    def drain(reason: str, seconds: float) -> None:
        told.append(seconds)
        if len(told) == 1:
            raise RaySystemError("the head does not answer")
        has_heard.set()

    monkeypatch.setattr(preemption, "find_notice", lambda cloud: 120.0)
    monkeypatch.setattr(preemption, "drain_this_machine", drain)
    monkeypatch.setattr(preemption, "_SECONDS_BETWEEN", 0.01)
    preemption.watch_for_notice("aws")
    assert has_heard.wait(5)
    assert told == [120.0, 120.0]


def test_machine_of_another_cloud_is_an_error_and_no_notice(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Metadata, "answers", {SCHEDULED: "<html>"})
    with pytest.raises(ValueError, match="Expecting value"):
        find_notice("azure", address)
