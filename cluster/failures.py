"""What an actor's exception says, in the project's own errors."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ray.exceptions import RayTaskError, UnserializableException

from logitstore.errors import CaptureError, ConfigError, LogitStoreError, StoreNotFoundError, TeacherError
from logitstore.teacher.openai_api_budget import SpendingLimitError
from logitstore.url_secrets import hide_secrets

# What an actor raised: itself, or its text alone where it cannot be unpickled here.
RAISED = (RayTaskError, UnserializableException)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_MARKERS = re.compile(r"^[ ^~]+\n", re.MULTILINE)  # under a line of source, also where Ray has left the source out
_ADDRESS = re.compile(r"\bip=([^,)\s]+)")
_RECORD_CHARACTERS = 4000
_LAST_LINES = 6


@dataclass(frozen=True, kw_only=True)
class ActorFailure:
    """An exception that an actor raised.

    Attributes:
        error: itself where it is one of ours, a `CaptureError` that names it otherwise.
        is_ours: whether it was raised on purpose.
        summary: class and message.
        traceback: of the actor.
        host: address of the actor's machine, as far as the traceback tells.
    """

    error: LogitStoreError
    is_ours: bool
    summary: str
    traceback: str
    host: str

    def build_record(self) -> str:
        """Summary and the end of the traceback, short enough for a quarantine record."""
        summary = self.summary[: _RECORD_CHARACTERS // 2]
        return f"{summary}\n{self.traceback[-(_RECORD_CHARACTERS - len(summary) - 1) :]}"

    def build_load_error(self, model: str) -> LogitStoreError:
        """The error that a capture ends with when its teacher cannot be loaded."""
        if self.is_ours:
            return self.error
        last_lines = "\n  ".join(self.traceback.strip().splitlines()[-_LAST_LINES:])
        return TeacherError(
            f"teacher {model!r}: expected it to load on {self.host}, found {self.summary}; "
            f"the actor's last lines were\n  {last_lines}"
        )

    def build_settings_error(self) -> LogitStoreError | None:
        """The error to end with where the actor's machine is not set up for the capture; None for other failures."""
        if not isinstance(self.error, ConfigError | StoreNotFoundError):
            return None
        if isinstance(self.error, SpendingLimitError):
            return SpendingLimitError(str(self.error))
        kind = ConfigError if isinstance(self.error, ConfigError) else StoreNotFoundError
        return kind(
            f"{self.error}\n  raised by the actor on {self.host}: the actor's machine does not see what this capture "
            "names; make store and corpus reachable from every machine, under the same address and credentials"
        )


def read_failure(error: RayTaskError | UnserializableException) -> ActorFailure:
    """What an actor raised, out of what Ray wraps it in."""
    cause = getattr(error, "cause", None)
    # Ray's error is also an instance of the cause's class; that one has the traceback only as its text.
    traceback = _MARKERS.sub("", _COLOUR.sub("", getattr(error, "traceback_str", None) or str(error)))
    # Clients name the URLs that they were sent to, signed ones too. Summary and traceback are logged and stored.
    traceback = _hide_secrets_of_lines(traceback)
    summary = (
        _hide_secrets_of_lines(f"{type(cause).__name__}: {cause}")
        if cause is not None
        else traceback.strip().rpartition("\n")[2]
    )
    address = _ADDRESS.search(traceback)
    return ActorFailure(
        error=cause if isinstance(cause, LogitStoreError) else CaptureError(summary),
        is_ours=isinstance(cause, LogitStoreError),
        summary=summary,
        traceback=traceback,
        host=address[1] if address else "its machine",
    )


def _hide_secrets_of_lines(text: str) -> str:
    return "\n".join(map(hide_secrets, text.split("\n")))
