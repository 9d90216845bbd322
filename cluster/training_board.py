"""The board of a training job: what its driver and its processes tell each other, wherever these run.

A *part* of a job is what is lost and begun again as a whole: the workers of a run, or the runs of a sweep that share a
stream. What has to survive is in the checkpoints of the runs; the board forgets everything with its job.

- A part begins with `begin`, and says how many steps it finds saved. One that begins at the same step again and again
  is not killed by chance, and is given up: that is what the number of tries means. One that was told to move has not
  failed.
- A process asks for its part's order now and then: to go on, to stop, or to move, which is to save and end here so
  that Ray begins the part again on a machine that stays.
- An error that no other try would get past is put on the board with `fail`, and stops all parts; the driver raises it.
- What a process notes of a run is merged by the run's name until the driver takes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from logitstore.errors import LogitStoreError

Order = Literal["go on", "stop", "move"]
Notes = dict[str, dict[str, Any]]
# Processes that are at work ask for their order twice a second.
_QUIET_SECONDS = 15.0
_NO_WORD = "no word from its processes, as when the machine or the system ends them"


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """What a part that begins is told.

    Attributes:
        order: whether it may begin; `stop` where the job is over, or the part is given up.
        notes: of the part's runs, as far as earlier processes of it came.
        given_up: why the part is given up; None where it is not.
    """

    order: Order
    notes: Notes
    given_up: str | None = None


@dataclass(frozen=True, kw_only=True)
class News:
    """What the driver has not heard yet.

    Attributes:
        notes: that processes made since the last time, by name.
        beginnings: a line for every part that began again since the last time.
        error: that ends the job; None where there is none.
    """

    notes: Notes
    beginnings: list[str]
    error: LogitStoreError | None


@dataclass(kw_only=True)
class _Part:
    task: Any = None
    names: tuple[str, ...] = ()
    saved_steps: int | None = None  # where it began last
    losses: int = 0  # in a row that began there
    trouble: str | None = None
    nodes: set[str] = field(default_factory=set)
    is_moving: bool = False
    failed_ranks: set[int] = field(default_factory=set)


class TrainingBoard:
    """An actor on the driver's machine; see the module's docstring.

    Args:
        tries: how often a part may begin without having come further than the time before.
        clock: in seconds.
    """

    def __init__(self, tries: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._tries, self._clock = tries, clock
        self._heard_at = self._stopped_at = clock()
        self._parts: dict[str, _Part] = {}
        self._known: Notes = {}
        self._news: Notes = {}
        self._beginnings: list[str] = []
        self._error: LogitStoreError | None = None
        self._should_stop = False

    def leave(self, part: str, task: object, names: Iterable[str]) -> None:
        """The driver leaves a task for a part that is to come, with the names of its runs."""
        self._parts[part] = _Part(task=task, names=tuple(names))

    def read_task(self, part: str) -> Any:
        """What the driver left for a part."""
        return self._parts[part].task

    def begin(self, part: str, saved_steps: int) -> Welcome:
        """A part begins: for the first time, or where its checkpoints left it."""
        this = self._parts[part]
        if this.saved_steps is not None:
            why = "it moved" if this.is_moving else this.trouble or _NO_WORD
            self._beginnings.append(f"{part}: begins again at step {saved_steps}; {why}")
        given_up = self._count_try(this, saved_steps)
        this.nodes, this.is_moving, this.failed_ranks, this.trouble = set(), False, set(), None
        order: Order = "stop" if self._should_stop or given_up else "go on"
        notes = {name: self._known[name] for name in this.names if name in self._known}
        return Welcome(order=order, notes=notes, given_up=given_up)

    def _count_try(self, part: _Part, saved_steps: int) -> str | None:
        if saved_steps != part.saved_steps:
            part.saved_steps, part.losses = saved_steps, 0
        elif not part.is_moving:
            part.losses += 1
        if part.losses < self._tries:
            return None
        return f"lost {part.losses} times at step {saved_steps}: {part.trouble or _NO_WORD}"

    def come(self, part: str, node: str) -> None:
        """A process of a part says on which machine it runs."""
        self._parts[part].nodes.add(node)

    def read_order(self, part: str) -> Order:
        """What a part is to do now; its processes ask all the time."""
        self._heard_at = self._clock()
        if self._should_stop:
            return "stop"
        return "move" if self._parts[part].is_moving else "go on"

    def note(self, name: str, changes: dict[str, Any]) -> None:
        """Note what has changed about a run."""
        self._known.setdefault(name, {}).update(changes)
        self._news.setdefault(name, {}).update(changes)

    def report_trouble(self, part: str, trouble: str) -> None:
        """Note what a process of a part ends with, though the next one may get past it."""
        self._parts[part].trouble = trouble

    def fail(self, part: str, rank: int, error: LogitStoreError) -> int:
        """End the job with an error, the first of several; how many ranks of the part have come here."""
        self._error = self._error or error
        self.ask_stop()
        self._parts[part].failed_ranks.add(rank)
        return len(self._parts[part].failed_ranks)

    def count_failed(self, part: str) -> int:
        """How many ranks of a part ended with an error."""
        return len(self._parts[part].failed_ranks)

    def ask_stop(self) -> None:
        """Have all parts save what they have, and end."""
        if not self._should_stop:
            self._should_stop, self._stopped_at = True, self._clock()

    def is_quiet(self) -> bool:
        """Whether the job is to stop, and no process of it has anything to save: what is left waits for machines."""
        return self._should_stop and self._clock() - max(self._heard_at, self._stopped_at) >= _QUIET_SECONDS

    def move_from(self, nodes: Collection[str]) -> list[str]:
        """Have parts that run on machines that will be taken away go elsewhere; those that did not know it yet."""
        told = []
        for name, part in self._parts.items():
            if not part.is_moving and not part.nodes.isdisjoint(nodes):
                part.is_moving = True
                told.append(name)
        return told

    def take_news(self) -> News:
        """What was noted since the last time."""
        news = News(notes=self._news, beginnings=self._beginnings, error=self._error)
        self._news, self._beginnings = {}, []
        return news
