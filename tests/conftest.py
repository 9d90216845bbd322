"""Fixtures for all tests."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from fault_proxy import FaultProxy
from made_up import VOCAB_SIZE, build_plan, build_records, put_shard
from made_up_draws import build_drawn_records
from s3_server import BUCKET, S3Server, run_s3_server

from logitstore.records import Record
from logitstore.shard.codec import Codec, Float32Codec
from logitstore.shard.writer import ShardSettings
from logitstore.store.commit import Outcome, build_attempt, commit_unit
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import write_manifest
from logitstore.store.plan import create_plan
from logitstore.teacher.protocol import Method, TopKMethod


def pytest_configure() -> None:
    """What the processes of a test run, and those that they start, have in common.

    One kind of authentication for every Ray of this process: Ray reads it once, and its servers in the process go by
    that ever after. Tests with Rays in processes of their own set theirs.

    Ctrl-C is heard: a shell without job control has what it runs in the background ignore it, children included.
    """
    os.environ["RAY_AUTH_MODE"] = "disabled"
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes minutes, unless it is asked for."""
    if "soak" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("soak"):
                item.add_marker(pytest.mark.skip(reason="pytest -m soak runs it"))


@pytest.fixture(autouse=True)
def _keep_loggers() -> Iterator[None]:
    """What a command run in this process sets up of loggers is taken back: other tests read what is logged."""
    loggers = [logging.getLogger(name) for name in (None, "logitstore", "trainer", "cluster", "tools")]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture
def make_records() -> Callable[..., list[Record]]:
    return build_records


@pytest.fixture
def build_store(tmp_path: Path) -> Callable[..., LogitStore]:
    """Function that fills a store with made-up records, drawn ones for a method that draws, and opens it."""

    def build(
        url: str | None = None,
        *,
        num_units: int = 3,
        records_per_unit: int = 20,
        sources: tuple[str, ...] = ("corpus",),
        method: Method | None = None,
        codec: Codec | None = None,
        **record_options: Any,
    ) -> LogitStore:
        files = StoreFiles(url or str(tmp_path / "store"))
        method = method or TopKMethod(k=8)
        shard = ShardSettings(codec=codec or Float32Codec(), row_group_bytes=2000)
        plan = create_plan(files, build_plan(num_units, sources=sources, method=method, shard=shard))
        for unit in range(num_units):
            make = partial(build_drawn_records, kind=method.kind) if method.is_drawn else build_records
            records = make(records_per_unit, unit=unit, vocab_size=VOCAB_SIZE, **record_options)
            assert commit_unit(files, put_shard(files, plan, unit, records, build_attempt(), tmp_path)) is Outcome.WON
        write_manifest(files, plan.compute_fingerprint())
        return LogitStore.open(files.url)

    return build


@pytest.fixture
def small_store_url(build_store: Callable[..., LogitStore]) -> str:
    """URL of a small store on disk."""
    return build_store().url


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server, one for each worker of a test run."""
    with run_s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_url(s3_server: S3Server, tmp_path: Path) -> Iterator[str]:
    """URL of an empty folder on the S3 server, whose address and credentials are in the environment of the test."""
    with mock.patch.dict(os.environ, s3_server.build_environment(), clear=True):
        yield f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Method of each request that goes over the wire from now on, repetitions by the client included."""
    import aiobotocore.httpsession

    methods: list[str] = []
    send = aiobotocore.httpsession.AIOHTTPSession.send

    async def count(session: Any, request: Any) -> Any:
        methods.append(request.method)
        return await send(session, request)

    monkeypatch.setattr(aiobotocore.httpsession.AIOHTTPSession, "send", count)
    return methods


@pytest.fixture(scope="session")
def running_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server).running() as proxy:
        yield proxy


@pytest.fixture
def proxy(running_proxy: FaultProxy, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """What breaks the wire between a client and the S3 server; nothing is broken at first, and clients do not wait."""
    import botocore.retryhandler

    # Bound by each client when it is made, and clients are kept: those of the proxy are made in these tests only.
    monkeypatch.setattr(botocore.retryhandler, "delay_exponential", lambda **_: 0.0)
    running_proxy.set()
    return running_proxy
