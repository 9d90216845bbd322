"""A stand-in for Ray's job client, whose head does as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

ADDRESS = "http://127.0.0.1:8265"


class FakeRayClient:
    """What `JobClient` needs of `ray.job_submission.JobSubmissionClient`.

    Attributes:
        log: pieces of the job's log; an exception among them is raised in its place, once; a float is a pause.
        statuses: what the job's status is, one after the other; the last one stays. An exception is raised.
        submitted: what was submitted.
        stopped: the jobs that were asked to stop.
    """

    def __init__(self, *, log: list[Any] | None = None, statuses: list[Any] | None = None, exit_code: int = 0) -> None:
        self.log = log if log is not None else ["hello\n"]
        self.statuses = statuses or ["SUCCEEDED"]
        self.exit_code = exit_code
        self.submitted: list[dict[str, Any]] = []
        self.stopped: list[str] = []
        self.submit_error: Exception | None = None

    def get_address(self) -> str:
        return ADDRESS

    def _do_request(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError

    def submit_job(self, **request: Any) -> str:
        self.submitted.append(request)
        if self.submit_error is not None:
            raise self.submit_error
        return str(request["submission_id"])

    def stop_job(self, name: str) -> bool:
        self.stopped.append(name)
        return True

    def get_job_info(self, name: str) -> SimpleNamespace:
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if isinstance(status, BaseException):
            raise status
        return self.build_details(name, status)

    def list_jobs(self) -> list[SimpleNamespace]:
        return [self.build_details("capture-2", "RUNNING"), self.build_details("capture-1", "SUCCEEDED")]

    def build_details(self, name: str, status: str) -> SimpleNamespace:
        number = int(name.rpartition("-")[2]) if name.rpartition("-")[2].isdigit() else 0
        has_ended = status in ("SUCCEEDED", "FAILED")
        return SimpleNamespace(
            submission_id=name,
            job_id=None,
            status=status,
            driver_exit_code=self.exit_code if has_ended else None,
            error_type=None,
            message="some words\nand more",
            entrypoint="exec python -m tools.submitted capture capture.yaml",
            metadata={"verb": "capture", "store": "s3://bucket/store", "job_submission_id": name},
            start_time=1_000_000 * number,
            end_time=1_000_000 * number + 61_000 if has_ended else 0,
        )

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        for piece in self._list_pieces():
            if isinstance(piece, float):
                await asyncio.sleep(piece)
            else:
                yield piece

    def _list_pieces(self) -> Iterator[Any]:
        """From the first one, as the head sends it to everybody who asks."""
        for piece in list(self.log):
            if isinstance(piece, BaseException):
                self.log.remove(piece)
                raise piece
            yield piece
