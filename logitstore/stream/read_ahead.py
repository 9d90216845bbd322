"""ReadAhead: threads that read row groups and join batches while the caller works.

The threads are daemons of our own, not those of an executor, which a leaving interpreter waits for: a read that hangs
or that waits before it tries again must not keep a finished program alive. They know the work, and the work does not
know the ReadAhead: one that is dropped ends its threads and leaves nothing behind.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import NoReturn

from logitstore.errors import ConfigError
from logitstore.records import RecordBatch
from logitstore.shard.exit_guard import hold_exit, is_leaving
from logitstore.shard.packed import PackedRowGroup
from logitstore.stream.read_plan import ReadPlan

# Joined batches that wait for the caller, besides one that waits for its place: they even out unequal steps.
_BATCHES_READY = 1

Records = RecordBatch | PackedRowGroup
Read = Callable[[int], Records]
Join = Callable[[Sequence[tuple[Records, int]]], RecordBatch]


class ClosedError(Exception):
    """The batches of a ReadAhead were asked for after, or while, it was closed."""


class _Failure:
    """What went wrong in a thread, to be raised once."""

    def __init__(self, error: BaseException) -> None:
        self._error: BaseException | None = error

    def throw(self) -> NoReturn:
        error, self._error = self._error, None
        assert error is not None
        try:
            raise error
        finally:
            del error  # or the error, its traceback and this frame would hold each other


class ReadAhead:
    """Batches of a plan, in order, made by threads of their own; the threads start with it.

    What goes wrong in a thread, of whatever kind, is raised by `take` in place of the batch that it happened to. The
    next `take` asks for the data again.

    Args:
        plan: which row groups to hold for which steps; belongs to the threads from now on.
        read: reads and decodes a row group; called from several threads.
        join: makes a batch of records, given as row groups and places in them.
        threads: how many read, at least 1; one more joins.
    """

    def __init__(self, plan: ReadPlan, *, read: Read, join: Join, threads: int) -> None:
        self._work = _Work(plan, read, join)
        # Before the threads: should one of them not start, the others end.
        self._finalizer = weakref.finalize(self, self._work.close)
        targets = [self._work.read_row_groups] * threads + [self._work.join_batches]
        for number, target in enumerate(targets):
            threading.Thread(target=target, name=f"logitstore-stream-{number}", daemon=True).start()

    def take(self) -> tuple[int, RecordBatch]:
        """The next step and its batch; waits for it.

        Raises:
            ClosedError: there will be no more.
            ConfigError: the interpreter leaves, and the batch was not ready before.
            BaseException: whatever a thread ran into at this step.
        """
        return self._work.take()

    def close(self) -> None:
        """End the threads, those that hang in a read when it returns; waits for none of them."""
        self._finalizer()


class _Work:
    """What the threads share. One lock; row groups that are asked for, read ones, and joined batches."""

    def __init__(self, plan: ReadPlan, read: Read, join: Join) -> None:
        self._plan, self._read, self._join = plan, read, join
        self._pid = os.getpid()
        # Reentrant: the garbage collector may drop a stream, and so close its work, anywhere in these threads.
        lock = threading.RLock()
        self._asked_more = threading.Condition(lock)
        self._read_more = threading.Condition(lock)
        self._batches_changed = threading.Condition(lock)
        self._lock = lock
        self._asked: deque[int] = deque()
        # None while a row group is being read or waits for a thread.
        self._row_groups: dict[int, Records | _Failure | None] = {}
        self._ready: deque[tuple[int, RecordBatch | _Failure]] = deque()
        self._is_paused = self._has_ended = False

    def close(self) -> None:
        if os.getpid() != self._pid:
            return  # a fork has none of the threads, and may have the lock as one of them held it
        with self._lock:
            self._has_ended = True
            self._asked, self._row_groups, self._ready = deque(), {}, deque()
            for condition in (self._asked_more, self._read_more, self._batches_changed):
                condition.notify_all()

    def take(self) -> tuple[int, RecordBatch]:
        with self._lock:
            if self._is_paused and not self._ready:  # its error was taken before
                self._is_paused = False
                self._batches_changed.notify_all()
            while not self._ready:
                if self._has_ended:
                    raise ClosedError
                if is_leaving() and threading.current_thread() is threading.main_thread():  # others end with it
                    raise ConfigError(
                        "stream: expected a running interpreter, found an interpreter that leaves, whose threads read "
                        "no more; take no batches in an atexit function"
                    )
                self._batches_changed.wait()
            step, batch = self._ready.popleft()
            self._batches_changed.notify_all()
        if isinstance(batch, _Failure):
            batch.throw()
        return step, batch

    def read_row_groups(self) -> None:
        """Body of a reading thread."""
        while True:
            with self._lock:
                while not self._asked and not self._has_ended:
                    self._asked_more.wait()
                if self._has_ended:
                    return
                row_group = self._asked.popleft()
                if row_group not in self._row_groups:
                    continue  # let go of meanwhile
            found: Records | _Failure
            try:
                found = self._read(row_group)
            except BaseException as error:  # noqa: BLE001  # the loop is to have it, whatever it is
                found = _Failure(error)
            with self._lock:
                if row_group in self._row_groups:
                    self._row_groups[row_group] = found
                    self._read_more.notify_all()
            del found  # while it waits for more, a thread holds nothing

    def join_batches(self) -> None:
        """Body of the joining thread."""
        try:
            while not self._has_ended:
                step, found = self._build_next()
                is_failure = isinstance(found, _Failure)
                self._deliver(step, found)
                # Raised in the loop, an error knows the loop's frames: held here, it would hold the stream.
                del found
                if is_failure:
                    self._pause()
        except BaseException as error:  # noqa: BLE001  # of the plan: what it holds is not sure any more
            with self._lock:
                if not self._has_ended:
                    self._ready.append((self._plan.step, _Failure(error)))
                    self._has_ended = True
                    for condition in (self._asked_more, self._batches_changed):
                        condition.notify_all()

    def _build_next(self) -> tuple[int, RecordBatch | _Failure]:
        step = self._plan.step
        try:
            for row_group in self._plan.take_asked():
                self._ask(row_group)
            joined = self._join_batch()
        except BaseException as error:  # noqa: BLE001  # the loop is to have it, whatever it is
            return step, _Failure(error)
        for row_group in self._plan.advance():
            with self._lock:
                self._row_groups.pop(row_group, None)
        return step, joined

    def _join_batch(self) -> RecordBatch:
        batch = self._plan.batch
        row_groups = {row_group: self._wait_for(row_group) for row_group in dict.fromkeys(batch.row_groups.tolist())}
        with hold_exit():
            return self._join(
                [
                    (row_groups[row_group], place)
                    for row_group, place in zip(batch.row_groups.tolist(), batch.records.tolist(), strict=True)
                ]
            )

    def _ask(self, row_group: int) -> None:
        with self._lock:
            if row_group not in self._row_groups and not self._has_ended:
                self._row_groups[row_group] = None
                self._asked.append(row_group)
                self._asked_more.notify()

    def _wait_for(self, row_group: int) -> Records:
        with self._lock:
            self._ask(row_group)  # it was, unless an error came between
            while not self._has_ended and self._row_groups[row_group] is None:
                self._read_more.wait()
            if self._has_ended:
                raise ClosedError
            found = self._row_groups[row_group]
            if isinstance(found, _Failure):
                del self._row_groups[row_group]
        if isinstance(found, _Failure):
            found.throw()
        assert found is not None
        return found

    def _deliver(self, step: int, found: RecordBatch | _Failure) -> None:
        """Hand a batch, or what went wrong, to the caller; waits until there is room for it."""
        with self._lock:
            while len(self._ready) >= _BATCHES_READY and not self._has_ended:
                self._batches_changed.wait()
            if self._has_ended:
                return
            self._ready.append((step, found))
            if isinstance(found, _Failure):
                self._is_paused = True
            self._batches_changed.notify_all()

    def _pause(self) -> None:
        """Wait until the caller wants to try again what went wrong, if ever; then read again what could not be."""
        with self._lock:
            while self._is_paused and not self._has_ended:
                self._batches_changed.wait()
            for row_group in [r for r, read in self._row_groups.items() if isinstance(read, _Failure)]:
                del self._row_groups[row_group]
                self._ask(row_group)
