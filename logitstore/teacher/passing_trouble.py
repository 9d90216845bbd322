"""Whether a teacher could not be loaded because of trouble that passes: a hub that is down, a network that is slow.

Libraries say that they found no model and mean that they could not ask; which one it was stands in the errors behind
theirs. They are told by their names, since which library asks differs by version, and none is imported for it.
"""

from __future__ import annotations

from collections.abc import Iterator

# Of httpx and its successors, requests, urllib3 and Python itself.
_NAMES = frozenset(
    {"ConnectionError", "TimeoutError", "NetworkError", "TimeoutException", "Timeout", "RemoteProtocolError"}
    | {"ChunkedEncodingError", "IncompleteRead"}
)
# A connection error of the hub's client that says that it was told not to connect.
_SETTINGS = frozenset({"OfflineModeIsEnabled"})
_STATUSES = frozenset({408, 425, 429})


def find_passing_trouble(error: BaseException) -> BaseException | None:
    """The error, itself or one behind it, that says that something did not answer; None where there is none."""
    chain = list(_list_causes(error))
    names = [{kind.__name__ for kind in type(cause).__mro__} for cause in chain]
    if any(_SETTINGS & own for own in names):
        return None
    return next((cause for cause, own in zip(chain, names, strict=True) if own & _NAMES or _was_refused(cause)), None)


def _was_refused(error: BaseException) -> bool:
    """Whether a server answered that it cannot just now."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(status, int) and (status in _STATUSES or 500 <= status < 600)


def _list_causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
