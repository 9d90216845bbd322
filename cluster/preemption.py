"""A cloud's notice that a machine will be taken away, passed on to Ray by an actor on that machine."""

from __future__ import annotations

import importlib
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Literal

import ray
from ray.exceptions import RayError

_LOG = logging.getLogger("logitstore.capture")
Cloud = Literal["aws", "azure", "gcp"]
_SECONDS_BETWEEN = 2.0
_ANSWER_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class CloudNotice:
    """Where a machine asks its cloud, and how long it has after the answer that it must go.

    Attributes:
        path: of the address; answered with 404 (aws) or with something else (azure, gcp) while nothing is known.
        headers: of the request.
        is_notice: whether an answer is one.
        seconds: that the cloud leaves from then on.
        token_path: where a token for the request is asked for first, None where it takes none.
        name_path: where the machine's name is asked for, None where nobody else is told of its notices.
        list_names: names of the machines that a notice is for.
    """

    path: str
    headers: Mapping[str, str]
    is_notice: Callable[[str], bool]
    seconds: float
    token_path: str | None = None
    name_path: str | None = None
    list_names: Callable[[str], Sequence[str]] = lambda answer: ()


def _list_preemptions(answer: str) -> list[dict[str, Any]]:
    return [event for event in json.loads(answer)["Events"] if event.get("EventType") == "Preempt"]


# Addresses and times as in the clouds' manuals: of spot machines, of preemptible ones on Google's.
ADDRESSES: dict[Cloud, str] = {
    "aws": "http://169.254.169.254",
    "azure": "http://169.254.169.254",
    "gcp": "http://metadata.google.internal",
}
NOTICES: dict[Cloud, CloudNotice] = {
    "aws": CloudNotice(
        path="/latest/meta-data/spot/instance-action",
        headers={},
        is_notice=lambda answer: '"action"' in answer,
        seconds=120.0,
        token_path="/latest/api/token",
    ),
    "azure": CloudNotice(
        path="/metadata/scheduledevents?api-version=2020-07-01",
        headers={"Metadata": "true"},
        is_notice=lambda answer: bool(_list_preemptions(answer)),
        seconds=30.0,
        # All machines of a scale set hear of each that goes.
        name_path="/metadata/instance/compute/name?api-version=2021-02-01&format=text",
        list_names=lambda answer: [
            name for event in _list_preemptions(answer) for name in event.get("Resources") or ()
        ],
    ),
    "gcp": CloudNotice(
        path="/computeMetadata/v1/instance/preempted",
        headers={"Metadata-Flavor": "Google"},
        is_notice=lambda answer: answer.strip() == "TRUE",
        seconds=30.0,
    ),
}


def find_notice(cloud: Cloud, address: str | None = None) -> float | None:
    """Seconds that this machine has left as its cloud says, or None where it says nothing of the kind.

    Args:
        cloud: whose machine it is.
        address: of the machine's metadata, the cloud's own by default.
    Raises:
        OSError, ValueError, KeyError: nobody answers there, or nobody of that cloud.
    """
    notice = NOTICES[cloud]
    address = address or ADDRESSES[cloud]
    headers = dict(notice.headers)
    if notice.token_path is not None:
        request = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
        headers["X-aws-ec2-metadata-token"] = _ask(address + notice.token_path, request, method="PUT")
    try:
        answer = _ask(address + notice.path, headers)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    if not notice.is_notice(answer):
        return None
    names = notice.list_names(answer)
    if notice.name_path is not None and names and _ask(address + notice.name_path, headers).strip() not in names:
        return None
    return notice.seconds


def _ask(url: str, headers: Mapping[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    # A machine's metadata is never behind a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=_ANSWER_SECONDS) as answer:
        text: str = answer.read().decode()
    return text


def watch_for_notice(cloud: Cloud) -> None:
    """Ask the cloud every two seconds, in a thread that ends with the process, and drain the machine at a notice."""
    threading.Thread(target=_watch, args=(cloud,), name="preemption notice", daemon=True).start()


def _watch(cloud: Cloud) -> None:
    has_warned = False
    while True:
        try:
            seconds = find_notice(cloud)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, HTTPException) as error:
            seconds = None
            level = logging.DEBUG if has_warned else logging.WARNING
            has_warned = True
            _LOG.log(level, "actors.notice: %s: this machine's metadata tells nothing: %s", cloud, error)
        if seconds is not None:
            try:
                drain_this_machine(f"notice of {cloud}", seconds)
            except (RayError, RuntimeError, OSError, ValueError) as error:  # there is time to tell it again
                _LOG.warning("Ray does not hear that this machine will be gone in %.0f s: %s", seconds, error)
            else:
                return
        time.sleep(_SECONDS_BETWEEN)


def drain_this_machine(reason: str, seconds: float) -> None:
    """Tell Ray that this process's machine will be gone in so many seconds: it places nothing there any more.

    Raises:
        ray.exceptions.RayError: Ray's head does not answer.
    """
    # What `ray drain-node` does; there is no public function, and these have no types.
    raylet: Any = importlib.import_module("ray._raylet")
    messages: Any = importlib.import_module("ray.core.generated.autoscaler_pb2")
    context = ray.get_runtime_context()
    raylet.GcsClient(address=context.gcs_address).drain_node(
        context.get_node_id(),
        messages.DRAIN_NODE_REASON_PREEMPTION,
        reason,
        int(1000 * (time.time() + seconds)),
    )
    _LOG.warning("this machine will be gone in %.0f s (%s)", seconds, reason)
