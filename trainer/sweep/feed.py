"""One stream of prepared steps for several runs, which are given every step in turn."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.batch import TrainBatch
from trainer.prefetch import PreparedStep, StepFeed
from trainer.run import Run
from trainer.sweep.plan import describe_collation


class RunFeed:
    """What a run of a `SharedFeed` has for a feed: it is given a step, takes it, and knows where it is.

    Attributes:
        collation: the same for runs that are given the same micro-batches.
    """

    def __init__(self, run: Run, source: StepFeed) -> None:
        self._run, self._source = run, source
        self._state = run.feed.state_dict()
        self._given: tuple[PreparedStep, dict[str, Any]] | None = None
        self._waited_seconds = 0.0
        self._seconds_at_turn: float | None = None  # of the source, when a turn of the run began
        self.collation = describe_collation(run.settings)

    @property
    def data_wait_seconds(self) -> float:
        """What the source has waited for in turns of this run."""
        if self._seconds_at_turn is None:
            return self._waited_seconds
        return self._waited_seconds + self._source.data_wait_seconds - self._seconds_at_turn

    def begin_turn(self) -> None:
        """From now on, waiting counts for this run."""
        self._seconds_at_turn = self._source.data_wait_seconds

    def end_turn(self) -> None:
        """From now on, it does not."""
        self._waited_seconds, self._seconds_at_turn = self.data_wait_seconds, None

    @property
    def position(self) -> int:
        """The global batch that the run takes next."""
        return int(self._state["step"])

    def give(self, prepared: PreparedStep, state: dict[str, Any]) -> None:
        """Have the run take a step next, after which the stream is in a state."""
        self._given = (prepared, state)

    def prepare(self, prepared: PreparedStep) -> PreparedStep:
        """Another run's step with this run's micro-batches, which are made when they are asked for."""
        return self._run.prepare(prepared.records)

    def __next__(self) -> PreparedStep:
        assert self._given is not None, "a step is given before it is taken"
        (prepared, self._state), self._given = self._given, None
        return prepared

    def state_dict(self) -> dict[str, Any]:
        """The stream's state after the step that this run took last."""
        return self._state

    def close(self) -> None:
        """Forget the step that was given; the stream belongs to all runs."""
        self._given = None


class SharedFeed:
    """Reads, decodes and lays out every step once for several runs whose streams deliver the same batches.

    The runs may stand at different steps, as they do after a kill between two of their checkpoints. The feed begins at
    the first of these; a run that is further takes part when the others have come up to it.

    Micro-batches are shared by the runs whose settings lay them out alike. Those that do it like the run whose feed is
    used get them from its thread; for others they are made once for each way of doing it, when the first of them asks.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        """Take over the feeds of the runs, none of which has been asked for a step; nothing is read yet.

        Args:
            runs: at least one; their streams have the same fingerprint.
        """
        assert len({run.stream.fingerprint for run in runs}) == 1
        # The records of one that needs document ids do for all; what is laid out for one that stays to the end has a
        # reader until then.
        leader = max(runs, key=lambda run: (_needs_documents(run), run.settings.steps - run.step))
        first = min(runs, key=lambda run: run.stream.step)
        self._source, self._collation = leader.feed, describe_collation(leader.settings)
        feeds = [RunFeed(run, self._source) for run in runs]
        leader.stream.load_state_dict(first.stream.state_dict())
        for run, feed in zip(runs, feeds, strict=True):
            if run is not leader:
                run.feed.close()
            run.feed = feed
        self.feeds = feeds

    def find_due(self, feeds: Iterable[RunFeed]) -> list[RunFeed]:
        """Those that the next step is for."""
        position = int(self._source.state_dict()["step"])
        return [feed for feed in feeds if feed.position == position]

    def advance(self, due: Sequence[RunFeed]) -> None:
        """Read the next step, and give it to runs that it is for.

        Raises:
            CorruptShardError, OutsideError: the store cannot be read.
        """
        prepared = next(self._source)
        state = self._source.state_dict()
        for collation in dict.fromkeys(feed.collation for feed in due):
            alike = [feed for feed in due if feed.collation == collation]
            own = prepared if collation == self._collation else alike[0].prepare(prepared)
            for feed, micro_batches in zip(alike, share(own.micro_batches, len(alike)), strict=True):
                feed.give(replace(own, micro_batches=micro_batches), state)

    def close(self) -> None:
        """Stop reading."""
        self._source.close()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Failure:
    error: Exception


def share(micro_batches: Iterable[TrainBatch], readers: int) -> list[Iterator[TrainBatch]]:
    """Iterators that each go over all micro-batches, which are made when the first of them gets there.

    One is kept as long as an iterator has not come past it. What fails in the making is raised in every iterator.
    """
    return [_unwrap(copy) for copy in itertools.tee(_wrap(micro_batches), readers)]


def _wrap(micro_batches: Iterable[TrainBatch]) -> Iterator[TrainBatch | _Failure]:
    """What fails becomes an item: a generator that raised would look like one at its end to whoever comes second."""
    try:
        yield from micro_batches
    except Exception as error:  # noqa: BLE001  # raised again by every reader
        yield _Failure(error=error)


def _unwrap(items: Iterator[TrainBatch | _Failure]) -> Iterator[TrainBatch]:
    for item in items:
        if isinstance(item, _Failure):
            raise item.error
        yield item


def _needs_documents(run: Run) -> bool:
    return run.reader is not None or (run.document_weights is not None and run.document_weights.needs_documents)
