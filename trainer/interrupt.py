"""A request to stop, made by SIGTERM: clusters send it some seconds before they take a machine away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """Whether somebody has asked this process to stop."""

    is_made: bool = False


@contextmanager
def listen_for_stop() -> Iterator[StopRequest]:
    """Turn SIGTERM into a request while the block runs; the earlier handler is back afterwards.

    Python lets only the main thread handle signals; in another one (Ray Train's) no request is ever made.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def make_request(number: int, frame: FrameType | None) -> None:
        request.is_made = True

    earlier = signal.signal(signal.SIGTERM, make_request)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, earlier)
