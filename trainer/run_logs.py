"""What a run writes down while it goes on: its settings, its metrics, and the records of every step if asked."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import yaml

from logitstore.errors import LogitStoreError
from logitstore.records import RecordBatch
from trainer.evaluate import Evaluation
from trainer.metrics import JsonLines, MetricsWriter, drop_later_lines
from trainer.progress import StepResult, StepWindow
from trainer.run import Run


class RunLogs:
    """The files of a run below its output folder; metrics are written by rank 0 alone."""

    def __init__(self, run: Run) -> None:
        """Open them where the run is, without what is about later steps; every rank has to come here.

        Raises:
            OutsideError: a rank cannot write them.
        """
        self._run = run
        self._window = StepWindow()
        self._metrics: MetricsWriter | None = None
        self._records: JsonLines | None = None
        self._evaluations: JsonLines | None = None
        try:
            with run.processes.fail_together(run.output):
                self._open()
        except LogitStoreError:
            self.close()
            raise

    def _open(self) -> None:
        run = self._run
        run.output.mkdir(parents=True, exist_ok=True)
        if run.is_first_rank:
            settings = yaml.safe_dump(run.settings.model_dump(mode="json"), sort_keys=False)
            (run.output / "settings.yaml").write_text(settings, encoding="utf-8")
            self._metrics = MetricsWriter(run.output, first_step=run.step)
            if len(run.held_out):
                again = run.step == run.settings.steps  # the end is all there is to do, and is done once more
                self._evaluations = JsonLines(run.output / "evaluations.jsonl", first_step=run.step - again)
            self._drop_of_earlier_ranks()
        if run.settings.log_records:
            path = run.output / f"records-rank{run.processes.rank}.jsonl"
            self._records = JsonLines(path, first_step=run.step)

    def _drop_of_earlier_ranks(self) -> None:
        """Drop what ranks wrote of steps that are made again without them: the run went on with fewer, or logs none."""
        writing = self._run.processes.world_size if self._run.settings.log_records else 0
        now = {f"records-rank{rank}.jsonl" for rank in range(writing)}
        for path in self._run.output.glob("records-rank*.jsonl"):
            if path.name not in now:
                drop_later_lines(path, self._run.step)

    def write_step(self, result: StepResult, batch: RecordBatch) -> None:
        """Take note of a step; a line of metrics is written every `log_every` steps and after the last one."""
        if self._records is not None:
            corpora = {} if batch.stream_sources is None else {"corpora": batch.stream_sources.tolist()}
            self._records.write(result.step, {"records": [str(address) for address in batch.addresses()], **corpora})
        self._window.add(result)
        settings = self._run.settings
        if result.step % settings.log_every and result.step != settings.steps:
            return
        waited = self._run.feed.data_wait_seconds
        means = self._window.compute_means(total_positions=self._run.positions, data_wait_seconds=waited)
        if self._metrics is not None:
            self._metrics.write(result.step, means)
        self._window = StepWindow(data_wait_seconds=waited)

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Write an evaluation at the run's present step: its figures as metrics, all of it to evaluations.jsonl."""
        if self._metrics is not None:
            self._metrics.write(self._run.step, evaluation.list_logged())
        if self._evaluations is not None:
            self._evaluations.write(self._run.step, evaluation.to_json())
        self._window.restart_clock()  # an evaluation is no part of a step's time

    def restart_clock(self) -> None:
        """Leave out of the time of steps what has passed since the last one: this process had other runs to look to."""
        self._window.restart_clock()

    def close(self) -> None:
        for file in (self._metrics, self._evaluations, self._records):
            if file is not None:
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
