"""A job as the head knows it, and what its end means for whoever waited."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from logitstore.errors import ConfigError, LogitStoreError, OutsideError

_ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
_ENVIRONMENT_FAILED = "RUNTIME_ENV_SETUP_FAILURE"
_NO_LOGITSTORE = re.compile(r"No module named '?(tools|logitstore|cluster|trainer)\b")
_MESSAGE_CHARACTERS = 2000


class UnknownJobError(ConfigError):
    """The head has no job of that name."""


class NotLetInError(ConfigError):
    """The head wants a token, or another one."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as the head knows it.

    Attributes:
        name: its submission id.
        status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        exit_code: of its command, 128 + n where signal n ended it; None while it runs, and where it never did.
        error: Ray's kind of failure; None where there is none.
        message: Ray's own words.
        entrypoint: its command.
        metadata: what `cluster.submit` says of it.
        started, ended: seconds since 1970, None where that has not happened.
    """

    name: str
    status: str
    exit_code: int | None
    error: str | None
    message: str
    entrypoint: str
    metadata: dict[str, str]
    started: float | None
    ended: float | None

    @property
    def has_ended(self) -> bool:
        return self.status in _ENDED


def read_job(details: Any) -> Job:
    """A job out of what Ray's client says of it (`ray.job_submission.JobDetails`)."""
    exit_code = details.driver_exit_code
    return Job(
        name=str(details.submission_id or details.job_id),
        status=str(getattr(details.status, "value", details.status)),
        exit_code=exit_code if exit_code is None or exit_code >= 0 else 128 - exit_code,
        error=details.error_type,
        message=details.message or "",
        entrypoint=details.entrypoint,
        metadata=dict(details.metadata or {}),
        started=None if details.start_time is None else details.start_time / 1000,
        ended=None if not details.end_time else details.end_time / 1000,
    )


def build_end_error(job: Job) -> LogitStoreError | None:
    """Why a job that has ended has no exit code of its own, or one that says too little; None where it says it all."""
    if job.status == "STOPPED":
        return OutsideError(
            f"job {job.name}: expected it to finish, found that it was stopped; submit it again to go on"
        )
    if job.status != "FAILED":
        return None
    if job.exit_code is None:
        kind = ConfigError if job.error == _ENVIRONMENT_FAILED else OutsideError
        return kind(
            f"job {job.name}: expected its command to run, found {job.error or 'that it did not'}; look at what Ray "
            f"says of it, and submit it again:\n  {job.message.strip()[-_MESSAGE_CHARACTERS:]}"
        )
    if _NO_LOGITSTORE.search(job.message):
        return ConfigError(
            f"job {job.name}: expected logitstore in the Python of the cluster's machines, found none; use an image "
            "that has it, name it under pip: in --runtime-env, or bring this one with --package"
        )
    return None
