"""What the commands show of a cluster's jobs."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tools.look import build_facts, build_table, format_seconds, print_json, print_result

if TYPE_CHECKING:
    from cluster.job_status import Job

_MESSAGE_CHARACTERS = 200


def print_job(job: Job, *, as_json: bool) -> None:
    """One job as facts, or as a JSON document."""
    if as_json:
        print_json(_describe(job))
        return
    first_line = job.message.strip().partition("\n")[0][:_MESSAGE_CHARACTERS]
    facts = [
        ("job", job.name),
        ("status", job.status.lower()),
        ("exit code", job.exit_code),
        *((key, value) for key, value in sorted(job.metadata.items()) if key != "job_submission_id"),
        ("started", _format_time(job.started)),
        ("took", None if job.started is None else format_seconds((job.ended or time.time()) - job.started)),
        ("command", job.entrypoint),
        ("message", first_line if job.status == "FAILED" and job.exit_code is None else None),
    ]
    print_result(build_facts(facts))


def print_jobs(jobs: Sequence[Job], *, as_json: bool) -> None:
    """Jobs in a table, or as a JSON document."""
    if as_json:
        print_json([_describe(job) for job in jobs])
        return
    rows = [
        (
            job.name,
            job.metadata.get("verb", ""),
            job.metadata.get("store") or job.metadata.get("output", ""),
            _format_time(job.started) or "",
            job.status.lower(),
            "" if job.exit_code is None else job.exit_code,
        )
        for job in jobs
    ]
    print_result(build_table(None, ["job", "verb", "store or output", "started", "status", "#exit code"], rows))


def _describe(job: Job) -> dict[str, object]:
    return {
        "job": job.name,
        "status": job.status,
        "exit_code": job.exit_code,
        "error": job.error,
        "message": job.message,
        "command": job.entrypoint,
        "metadata": job.metadata,
        "started": job.started,
        "ended": job.ended,
    }


def _format_time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
