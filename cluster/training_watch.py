"""Both sides of the board of a training job: the driver that watches, and processes that take note and obey."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.draining import read_draining
from cluster.training_board import News, TrainingBoard
from logitstore.errors import ConfigError, OutsideError
from trainer.checkpoint import find_latest_checkpoint, read_header
from trainer.config import TrainSettings
from trainer.interrupt import StopRequest, listen_for_stop

_LOG = logging.getLogger("logitstore.job")
_LOOK_SECONDS = 0.5
_NOTE_SECONDS = 0.5
# A part of a run or of a sweep may begin so often at one step. A storage that is away for a minute, and comes back,
# takes about three.
TRIES = 5
T = TypeVar("T")


def start_board(name: str | None = None) -> Any:
    """The handle of a new job's board, an actor that lives with this process, on this machine."""
    here = ray.get_runtime_context().get_node_id()
    place = NodeAffinitySchedulingStrategy(node_id=here, soft=False)
    return ray.remote(TrainingBoard).options(name=name, num_cpus=0, scheduling_strategy=place).remote(TRIES)


class _Fit(threading.Thread, Generic[T]):
    """What Ray runs while the driver looks at the board."""

    def __init__(self, fit: Callable[[], T]) -> None:
        super().__init__(name="logitstore-fit", daemon=True)
        self._fit = fit
        self.results: list[T] = []
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.results.append(self._fit())
        except Exception as error:  # noqa: BLE001  # raised where the job is watched
            self.error = error


def watch_job(fit: Callable[[], T], board: Any, on_news: Callable[[News], None]) -> T | None:
    """Run a job to its end; call it from the main thread.

    SIGTERM has the job save what it has and end. Parts of it on machines that Ray will take away are told to move.

    Args:
        fit: Ray's loop, which ends when all parts of the job have.
        board: of the job, which ends with it.
        on_news: called with what the board has, twice a second and once after the end.

    Returns:
        What `fit` returns; None of a job that was stopped while all that was left of it waited for machines.

    Raises:
        LogitStoreError: what a process of the job failed with.
        OutsideError: Ray's loop failed.
    """
    loop = _Fit(fit)
    try:
        with listen_for_stop() as request:
            loop.start()
            is_quiet = False
            while loop.is_alive() and not is_quiet:
                loop.join(_LOOK_SECONDS)
                if request.is_made:
                    ray.get(board.ask_stop.remote())
                _pass_on(board, on_news)
                is_quiet = ray.get(board.is_quiet.remote())
        news = _pass_on(board, on_news)
    except RayError as error:
        raise _describe_trouble(error) from error
    finally:
        with contextlib.suppress(RayError, RuntimeError):
            ray.kill(board)
    if news.error is not None:
        raise news.error
    if loop.error is not None:
        raise _describe_trouble(loop.error) from loop.error
    return loop.results[0] if loop.results else None


def _pass_on(board: Any, on_news: Callable[[News], None]) -> News:
    """Tell parts to move, and the driver what is new."""
    for part in ray.get(board.move_from.remote(list(read_draining()))):
        _LOG.warning("%s is on a machine that will be taken away: it is saved, and goes on elsewhere", part)
    news: News = ray.get(board.take_news.remote())
    for line in news.beginnings:
        _LOG.warning("%s", line)
    on_news(news)
    return news


def _describe_trouble(error: Exception) -> OutsideError:
    return OutsideError(
        f"Ray: expected the job to come to its end, found {type(error).__name__}: {error}; look at the cluster, then "
        "run the command again"
    )


def _look(board: Any, request: StopRequest, on_news: Callable[[News], None]) -> News:
    """Pass on what there is, in both directions."""
    if request.is_made:
        ray.get(board.ask_stop.remote())
    return _pass_on(board, on_news)


@contextmanager
def follow_orders(board: Any, part: str, request: StopRequest) -> Iterator[None]:
    """Turn the orders of a part into a request to stop while the block runs."""
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(_LOOK_SECONDS):
            try:
                request.is_made |= ray.get(board.read_order.remote(part)) != "go on"
            except RayError:
                return  # the driver is gone, and this process will be

    thread = threading.Thread(target=look, name="logitstore-orders", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


class MovedError(Exception):
    """Has Ray begin a part of a job again: it is saved, and its machine will be taken away."""


def find_saved_steps(settings: TrainSettings) -> int:
    """Steps of a run's newest checkpoint, 0 without any.

    Raises:
        TrainingError: its header cannot be read.
    """
    latest = find_latest_checkpoint(Path(settings.output) / "checkpoints")
    return 0 if latest is None else read_header(latest).step


def describe_loss(what: str, given_up: str) -> str:
    """The message about a part of a job that is given up."""
    return (
        f"{what}: expected to come further, found workers {given_up}; look for what ends them, or have checkpoints "
        "written more often (checkpoint_every), then run the command again"
    )


class Notes:
    """Notes about runs that a process sends to the board, not more often than anybody looks."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._next = 0.0

    def note_now_and_then(self, name: str, changes: Callable[[], dict[str, Any]]) -> None:
        """Note what a function returns, which is not asked if something was noted a moment ago."""
        if (now := time.monotonic()) >= self._next:
            self._next = now + _NOTE_SECONDS
            self._board.note.remote(name, changes())

    def note(self, name: str, changes: dict[str, Any]) -> None:
        """Note changes, and return when the board has them."""
        ray.get(self._board.note.remote(name, changes))


class SharedFolder:
    """A file that the driver puts into an output folder, by which processes know that they see the same folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._host = folder, socket.gethostname()
        self._path = folder / f".job-{uuid.uuid4().hex}"

    def __enter__(self) -> SharedFolder:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._path.touch()
        except OSError as error:
            raise OutsideError(
                f"output {self._folder}: expected a folder to write to, found {error.strerror or error}"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)

    def check_is_seen(self) -> None:
        """Check that this process sees what the driver wrote.

        Raises:
            ConfigError: names both machines.
        """
        for folder in (self._folder, self._folder.parent):
            if folder.is_dir():
                list(folder.iterdir())  # network file systems look again
        if not self._path.exists():
            raise ConfigError(
                f"output: expected a folder that all machines of the cluster share, found {self._folder.absolute()} on "
                f"{self._host} and another one on {socket.gethostname()}; name one on a shared file system"
            )
