"""An end to a process that does not come to the end of what it is at."""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Iterator

_STDERR = 2


@contextlib.contextmanager
def limit_seconds(seconds: float | None) -> Iterator[None]:
    """End this process if the block takes longer, also where it holds Python's lock; its log has where it was.

    Whoever called the actor sees that it died. Where another limit of the same kind was set, it is gone.
    """
    if seconds is None:
        yield
        return
    faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
