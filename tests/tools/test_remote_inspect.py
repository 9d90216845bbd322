"""`logitstore inspect` over a wire: how often it asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from logitstore.store.logit_store import LogitStore


@pytest.mark.parametrize("what", [[], ["--record", "31"], ["--record", "2/3", "--min-entropy", "1"]])
def test_inspect_of_a_remote_store_takes_fewer_than_10_requests(
    what: list[str],
    build_store: Callable[..., LogitStore],
    s3_url: str,
    requests: list[str],
    logitstore: Any,
) -> None:
    store = build_store(s3_url, num_units=12)
    requests.clear()
    found = logitstore.json("inspect", s3_url, *what)
    assert 0 < len(requests) < 10, requests
    assert found["store"] == store.url


def test_inspect_of_a_remote_shard_takes_fewer_than_10_requests(
    build_store: Callable[..., LogitStore], s3_url: str, requests: list[str], logitstore: Any
) -> None:
    store = build_store(s3_url, num_units=12)
    file = store.manifest.read_units("file")["file"][5].as_py()
    for what in ([], ["--record", "3"]):
        requests.clear()
        logitstore.json("inspect", f"{s3_url}/{file}", *what)
        assert 0 < len(requests) < 10, requests
