"""Jobs on a Ray cluster, by its job API: start, follow, look at, stop.

The head answers over HTTP; a stream of log lines comes over a WebSocket. Either may break while the job goes on, so a
follower asks after the job whenever the lines pause, picks the log up where it stopped, and gives up only when the head
has not answered for a minute, or has forgotten the job, which is what a new head does.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

from cluster.job_status import Job, NotLetInError, UnknownJobError, read_job
from cluster.submit import JobRequest
from logitstore.errors import ConfigError, LogitStoreError, OutsideError
from logitstore.url_secrets import hide_secrets

_LOG = logging.getLogger("logitstore.submit")
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_HEADERS_VARIABLE = "RAY_JOB_HEADERS"  # as the `ray job` command has it
# Uploads, and the ends of connections: nothing that a user can do anything about.
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_NOBODY = re.compile(r"Connection refused|timed out|Failed to connect|Failed to resolve|Cannot connect|No route")
_REACH_SECONDS = 10.0
_ANSWER_SECONDS = 120.0  # an upload is answered when it is stored
_QUIET_SECONDS = 15.0
_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 60.0
_MESSAGE_CHARACTERS = 1000
# What Ray without its extra does not bring, or may not.
_OF_JOB_API = ("ray", "aiohttp", "requests")
_NO_JOB_API = (
    "python environment: expected Ray with its job API, found Ray alone; install it with\n  pip install 'ray[default]'"
)


class JobClient:
    """Talks to the head of one cluster.

    Args:
        address: http://HEAD:8265; None takes RAY_API_SERVER_ADDRESS, RAY_ADDRESS or the cluster on this machine.
    Raises:
        ConfigError: no such address, no token or a wrong one, or Ray here has no job API.
        OutsideError: nobody answers there.
    """

    def __init__(self, address: str | None) -> None:
        if address in (None, "auto"):
            address = None
        elif not str(address).startswith(("http://", "https://")):
            raise ConfigError(
                f"--address: expected http://HEAD:8265, the address of the head's dashboard, found {address!r}; "
                "host:port and ray://host:port are for 'logitstore capture --address'"
            )
        self._where = hide_secrets(address or "the Ray cluster of this machine")
        with self._explained():
            self._ray = _open(address)
        self._where = hide_secrets(self._ray.get_address())
        # Ray itself would wait for ever.
        self._ray._do_request = partial(self._ray._do_request, timeout=(_REACH_SECONDS, _ANSWER_SECONDS))

    @property
    def address(self) -> str:
        """Of the head, as it may be printed."""
        return self._where

    def start(self, request: JobRequest) -> str:
        """Upload what a job needs and start it; returns its name.

        Raises:
            ConfigError: the name is taken, or Ray refuses the runtime environment.
            OutsideError: the head did not take the job.
        """
        try:
            with self._explained():
                self._ray.submit_job(
                    entrypoint=request.entrypoint,
                    runtime_env=request.runtime_env,
                    metadata=request.metadata,
                    submission_id=request.name,
                )
        except OutsideError as error:
            # The answer may be lost where the request was not.
            with contextlib.suppress(LogitStoreError):
                self.read(request.name)
                return request.name
            raise error
        return request.name

    def read(self, name: str) -> Job:
        """What the head knows of a job.

        Raises:
            ConfigError: nothing.
            OutsideError: the head does not answer.
        """
        with self._explained(name):
            return read_job(self._ray.get_job_info(name))

    def list(self) -> list[Job]:
        """All jobs that were submitted to the cluster, oldest first."""
        with self._explained():
            found = [job for job in self._ray.list_jobs() if job.submission_id is not None]
        return sorted(map(read_job, found), key=lambda job: job.started or 0.0)

    def stop(self, name: str, *, wait: bool = True) -> Job:
        """Ask a job to stop, SIGTERM first; with `wait`, until it has. One that has ended stays as it is."""
        with self._explained(name):
            self._ray.stop_job(name)
        return self._wait(name) if wait else self.read(name)

    def follow(self, name: str, write: Callable[[str], object]) -> Job:
        """Pass a job's log on, from its first line, until the job has ended.

        Raises:
            OutsideError: the head has not answered for a minute, or does not know the job any more.
            NotLetInError: it wants another token, which a head that was let into before does when it is a new one.
        """
        shown = 0
        was_let_in = False
        heard = time.monotonic()

        def show(text: str, end: int) -> None:
            nonlocal shown, heard, was_let_in
            was_let_in = True
            heard = time.monotonic()
            if end > shown:
                write(text[max(0, len(text) - (end - shown)) :])
                shown = end

        while True:
            try:
                asyncio.run(self._tail(name, show))
                job = self.read(name)
                was_let_in = True
                heard = time.monotonic()
                if job.has_ended:
                    return job
            except UnknownJobError as error:
                raise self._build_forgotten_error(name) from error
            except NotLetInError as error:
                if not was_let_in:
                    raise
                raise self._build_token_error(name) from error
            except OutsideError:
                if time.monotonic() - heard > _PATIENCE_SECONDS:
                    raise
                _LOG.warning("%s does not answer; trying again", self._where)
            time.sleep(_POLL_SECONDS)

    async def _tail(self, name: str, show: Callable[[str, int], None]) -> None:
        """Show each piece of the log with the number of characters up to its end; returns when there is no more."""
        pieces = aiter(self._ray.tail_job_logs(name))
        end = 0
        next_piece = asyncio.ensure_future(anext(pieces, None))
        try:
            while True:
                done, _ = await asyncio.wait({next_piece}, timeout=_QUIET_SECONDS)
                if not done:
                    job = await asyncio.to_thread(self.read, name)
                    if job.has_ended:
                        return
                    if job.status == "PENDING":
                        _LOG.info("job %s has not begun: the cluster makes its environment, or has no room yet", name)
                    show("", 0)
                    continue
                with self._explained(name):
                    piece = next_piece.result()
                if piece is None:
                    return
                end += len(piece)
                show(piece, end)
                next_piece = asyncio.ensure_future(anext(pieces, None))
        finally:
            next_piece.cancel()

    def _wait(self, name: str) -> Job:
        while not (job := self.read(name)).has_ended:
            time.sleep(_POLL_SECONDS)
        return job

    def _build_forgotten_error(self, name: str) -> OutsideError:
        return OutsideError(
            f"{self._where}: expected to know the job {name}, found a head that does not: it was restarted, and the "
            "job ended with the old one; submit it again, what is committed stays"
        )

    def _build_token_error(self, name: str) -> NotLetInError:
        return NotLetInError(
            f"{self._where}: expected to be let in as before, found a head that wants another token: it was restarted, "
            f"and the job {name} ended with the old one; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the new token "
            "and submit it again, what is committed stays"
        )

    @contextlib.contextmanager
    def _explained(self, name: str | None = None) -> Iterator[None]:
        """Ray's many ways to say that something went wrong, as our errors; `name` is the job that is asked about."""
        try:
            yield
        except LogitStoreError:
            raise
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "ray":
                raise
            raise ConfigError(_NO_JOB_API) from error
        except Exception as error:
            explained = _explain(error, self._where, name)
            if explained is None:
                raise
            raise explained from error


def _open(address: str | None) -> Any:
    """Ray's own client, for the address that was asked for."""
    for package in _OF_JOB_API:
        importlib.import_module(package)
    import requests
    from ray.job_submission import JobSubmissionClient

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    # Ray would let the environment win over the command line.
    hidden = dict.fromkeys(_ADDRESS_VARIABLES, "") if address is not None else {}
    with mock.patch.dict(os.environ, hidden):
        if address is not None:
            # Ray itself would wait for minutes where nobody is. Whether we may come in is asked next.
            requests.get(f"{address.rstrip('/')}/api/version", timeout=_REACH_SECONDS)
        return JobSubmissionClient(address, headers=_read_headers())


def _explain(error: Exception, where: str, name: str | None) -> LogitStoreError | None:
    """An exception of Ray's client or of what it stands on in our words; None for a bug."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    text = hide_secrets(" ".join(str(error).split()))[-_MESSAGE_CHARACTERS:]
    if "ray[default]" in text:
        return ConfigError(_NO_JOB_API)
    if isinstance(error, AuthenticationError) or getattr(error, "status", None) in (401, 403):
        return NotLetInError(
            f"{where}: expected to be let in, found {text.partition(':')[0].lower()}; set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token that the cluster was started with"
        )
    if "already exists" in text:
        return ConfigError(f"{where}: expected a new name for the job, found one that is taken; choose another --name")
    if name is not None and ("does not exist" in text or getattr(error, "status", None) == 404):
        return UnknownJobError(
            f"{where}: expected a job {name!r}, found none of that name; 'logitstore submit status' lists them"
        )
    if "returned 404" in text:
        return OutsideError(
            f"{where}: expected the job API of a Ray head, found something else; check the address, and that the head "
            "has ray[default] installed"
        )
    if isinstance(error, requests.exceptions.InvalidURL | requests.exceptions.InvalidSchema):
        return ConfigError(f"--address: expected http://HEAD:8265, found {where!r}")
    if isinstance(error, OSError | RuntimeError | aiohttp.ClientError):
        found = "nobody there" if _NOBODY.search(text) else f"{type(error).__name__}: {text}"
        return OutsideError(
            f"{where}: expected the head of a Ray cluster to answer, found {found}; check the address, and that the "
            "head is up"
        )
    if isinstance(error, ValueError | TypeError):
        return ConfigError(f"{where}: expected a job that Ray can run, found {text}; look at --runtime-env")
    return None


def _read_headers() -> dict[str, str]:
    """Headers of every request, for proxies that ask for a login of their own."""
    text = os.environ.get(_HEADERS_VARIABLE, "{}")
    try:
        headers = json.loads(text)
    except ValueError:
        headers = None
    if not isinstance(headers, dict):
        raise ConfigError(
            f'{_HEADERS_VARIABLE}: expected a JSON mapping such as {{"Cookie": "…"}}, found something else'
        )
    return headers
