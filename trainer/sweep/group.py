"""Runs that share a stream, trained in lock-step by one process, or by each of several."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from logitstore.errors import CorruptShardError, LogitStoreError, OutsideError, TrainingError
from trainer.distributed import Processes
from trainer.interrupt import StopRequest
from trainer.loop import finish_run, is_checkpoint_due, is_due, take_step
from trainer.progress import StepResult
from trainer.run import Run, prepare_run
from trainer.run_logs import RunLogs
from trainer.run_results import evaluate_run, save_run
from trainer.sweep.feed import RunFeed, SharedFeed
from trainer.sweep.record import RunRecord
from trainer.sweep.settings import SweepRun

_LOGGER = logging.getLogger(__name__)
OnStep = Callable[[str, StepResult], None]


@dataclass(kw_only=True, eq=False)
class _Member:
    """A run of a group. Time counts for it in its turns alone."""

    name: str
    run: Run
    logs: RunLogs
    first_step: int
    seconds: float
    feed: RunFeed = field(init=False)
    is_over: bool = False

    @property
    def is_done(self) -> bool:
        return self.run.step >= self.run.settings.steps

    @contextmanager
    def turn(self) -> Iterator[None]:
        self.logs.restart_clock()
        self.feed.begin_turn()
        self._clock = time.perf_counter()
        try:
            yield
        finally:
            self.count_seconds()
            self.feed.end_turn()

    def count_seconds(self) -> None:
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now

    def close(self) -> None:
        self.is_over = True
        self.run.let_go()
        self.logs.close()


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupTraining:
    """Trains the groups of a sweep, one after another.

    Attributes:
        processes: of the sweep.
        stop_request: made by whoever wants the sweep to stop.
        record: of the sweep.
        on_step: called on every rank after every step of a run, with the run's name.
    """

    processes: Processes
    stop_request: StopRequest
    record: RunRecord
    on_step: OnStep | None = None

    def should_stop(self) -> bool:
        """Whether any rank was asked to stop; all ranks come here at the same time."""
        return self.processes.sum_over_ranks([self.stop_request.is_made])[0] > 0

    def train(self, runs: Sequence[SweepRun]) -> None:
        """Train runs that share a stream to their ends, or until somebody asks the sweep to stop.

        What became of them is in the record. One that cannot go on leaves, and the others do not notice.

        Raises:
            CorruptShardError, OutsideError: the store cannot be read, which no run would get past.
        """
        members: list[_Member] = []
        try:
            for run in runs:
                if not self.should_stop():  # students may take long to load
                    self._prepare(run, members)
            for alike in _split_by_stream(members):
                if not self.should_stop():
                    self._train_together(alike)
            for member in members:
                if not member.is_over:
                    self._note(member, status="interrupted")
        finally:
            for member in members:
                member.close()

    def _prepare(self, planned: SweepRun, members: list[_Member]) -> None:
        """Add a run where its newest checkpoint left it; one whose settings cannot be used has failed."""
        run = self._prepare_or_note(planned)
        if run is None:
            gc.collect()  # what came of it before it failed
            return
        try:
            seconds = self.record.results[planned.name].seconds if run.step else 0.0
            member = _Member(name=planned.name, run=run, logs=RunLogs(run), first_step=run.step, seconds=seconds)
        except BaseException:
            run.let_go()
            raise
        members.append(member)
        parameters = sum(parameter.numel() for parameter in run.student.parameters())
        self._note(member, status="running", parameters=parameters, error=None)

    def _prepare_or_note(self, planned: SweepRun) -> Run | None:
        try:
            return prepare_run(self.record.find_settings(planned), self.processes)
        except (CorruptShardError, OutsideError):
            raise
        except (LogitStoreError, torch.OutOfMemoryError) as error:
            self._check_is_of_all(error, LogitStoreError)
            self._note_failure(planned.name, str(error))
            return None

    def _train_together(self, members: list[_Member]) -> None:
        shared = SharedFeed([member.run for member in members])
        try:
            for member, feed in zip(members, shared.feeds, strict=True):
                member.feed = feed
                if member.is_done:  # the process was killed between its last step and its end
                    with member.turn():
                        self._attempt(member, self._finish)
            while (active := [member for member in members if not member.is_over]) and not self.should_stop():
                self._make_step(shared, active)
            self._save_all(active)
        finally:
            shared.close()

    def _make_step(self, shared: SharedFeed, active: Sequence[_Member]) -> None:
        """One global batch: a step of every run that it is next for. Waiting for it counts for the first of them."""
        due = shared.find_due([member.feed for member in active])
        turns = [member for member in active if member.feed in due]
        if not turns:  # those that were behind have failed, and nobody else has come as far
            shared.advance([])
        should_stop = False
        for number, member in enumerate(turns):
            if should_stop:
                return
            with member.turn():
                if number == 0:
                    shared.advance(due)
                self._attempt(member, self._take_step)
                should_stop = self.should_stop()
                if should_stop:  # at once: whoever asked may not wait for an evaluation, nor for other runs' steps
                    self._save_all(active)
                if not member.is_over:
                    self._attempt(member, self._follow_step)

    def _attempt(self, member: _Member, act: Callable[[_Member], None]) -> None:
        """Do something for a run, which leaves if it cannot go on."""
        try:
            act(member)
            return
        except (CorruptShardError, OutsideError):
            raise
        except (LogitStoreError, torch.OutOfMemoryError) as error:
            self._check_is_of_all(error, TrainingError)
            failure = str(error)
        member.close()  # not before the error has let go of what it was at work on
        self._note(member)
        self._note_failure(member.name, failure)

    def _check_is_of_all(self, error: Exception, kind: type[LogitStoreError]) -> None:
        """Raise an error that may have happened on this rank alone, for which others would wait, if not of a kind."""
        if self.processes.world_size > 1 and not isinstance(error, kind):
            raise error

    def _take_step(self, member: _Member) -> None:
        prepared = next(member.run.feed)
        result = take_step(member.run, prepared)
        member.logs.write_step(result, prepared.records)
        if self.on_step is not None:
            self.on_step(member.name, result)

    def _follow_step(self, member: _Member) -> None:
        """What the loop of `trainer.loop.train` does after a step."""
        run = member.run
        if is_due(run, run.settings.evaluate_every) and not member.is_done:
            member.logs.write_evaluation(evaluate_run(run))
        if is_checkpoint_due(run):
            self._save(member)
        if member.is_done:
            self._finish(member)

    def _save_all(self, members: Sequence[_Member]) -> None:
        for member in members:
            if not member.is_over:
                self._attempt(member, self._save)

    def _save(self, member: _Member) -> None:
        save_run(member.run)
        self._note(member)

    def _finish(self, member: _Member) -> None:
        run = member.run
        if run.document_weights is not None and run.step > member.first_step:
            run.document_weights.report_unmet(run.processes, member.first_step + 1, run.step)
        report = finish_run(run, member.logs)
        member.count_seconds()
        self._note(
            member,
            status="finished",
            evaluation=None if report.evaluation is None else report.evaluation.list_scalars(),
            student=str(report.student),
            identity=self.record.describe_run(run.settings),
        )
        member.close()

    def _note(self, member: _Member, **changes: object) -> None:
        run = member.run
        figures = {"steps": run.step, "skipped_steps": run.skipped.total, "positions": run.positions}
        self.record.update(member.name, seconds=member.seconds, **figures, **changes)

    def _note_failure(self, name: str, error: str) -> None:
        _LOGGER.error("run %s: %s", name, error)
        self.record.update(name, status="failed", error=error)


def _split_by_stream(members: Sequence[_Member]) -> list[list[_Member]]:
    """Members whose streams deliver the same batches at the same steps.

    All of a group do, unless checkpoints of mixtures bring other pasts with them.
    """
    alike: dict[str, list[_Member]] = {}
    for member in members:
        state = {name: value for name, value in member.run.stream.state_dict().items() if name != "step"}
        alike.setdefault(json.dumps(state, sort_keys=True), []).append(member)
    return list(alike.values())
