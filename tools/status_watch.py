"""Following a capture from anywhere: its store is read again and again until nothing is left to wait for."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Group
from rich.live import Live

from logitstore.errors import OutsideError
from logitstore.store.files import StoreFiles
from tools.look import can_redraw, open_console, print_note, print_result
from tools.status_view import describe_in_one_line, render_status
from tools.store_status import StatusReader, StoreStatus


def watch_status(files: StoreFiles, *, seconds: float, pause: Callable[[float], object] = time.sleep) -> None:
    """Show where a store stands until it is over: in place on a terminal, line by line elsewhere.

    Between two looks `seconds` pass, and at least as long as the look took: a store of a million units takes a while to
    list. Once it has been seen, storage that fails is waited for.

    Raises:
        StoreNotFoundError, IncompatibleStoreError, CorruptShardError: there is no store, or it cannot be read.
        OutsideError: the storage failed at the first look.
    """
    reader = StatusReader(files)
    console = open_console()
    if not can_redraw(console):
        print_result(*render_status(_follow(reader, _print_line, seconds, pause)))
        return
    with Live(console=console, auto_refresh=False) as live:
        _follow(reader, lambda status: live.update(Group(*render_status(status)), refresh=True), seconds, pause)


def _follow(
    reader: StatusReader, show: Callable[[StoreStatus], None], seconds: float, pause: Callable[[float], object]
) -> StoreStatus:
    """Show every status; the one that is over comes back."""
    status: StoreStatus | None = None
    while True:
        started = time.monotonic()
        try:
            status = reader.read()
        except OutsideError as error:
            if status is None:
                raise
            print_note(f"the store cannot be read at the moment: {error}")
        else:
            show(status)
            if status.is_over:
                return status
        pause(max(seconds, time.monotonic() - started))


def _print_line(status: StoreStatus) -> None:
    print(f"{time.strftime('%H:%M:%S')} {describe_in_one_line(status)}", flush=True)
