"""What a sweep remembers of itself in sweep.json: the manifests it reads, and how far each run is."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from logitstore import __version__
from logitstore.errors import ConfigError, TrainingError
from logitstore.store.logit_store import LogitStore
from trainer.checkpoint import CheckpointHeader, check_same_run, find_latest_checkpoint, read_header
from trainer.config import TrainSettings
from trainer.distributed import Processes
from trainer.run_identity import describe_settings
from trainer.stream_config import FurtherCorpusSettings, FurtherTeacherSettings
from trainer.sweep.settings import Sweep, SweepRun
from trainer.writing import writing

_LOGGER = logging.getLogger(__name__)
Status = Literal["planned", "running", "interrupted", "finished", "failed"]


class RunResult(BaseModel):
    """How far a run is, and what it reached.

    Attributes:
        name, labels: as in `SweepRun`.
        output: its folder.
        stream: number of the group of runs that share a stream, from 0.
        status: `running` is also that of a run whose process was killed.
        steps: done, of all.
        skipped_steps: of those, how many were skipped because loss or gradient were not finite.
        positions: trained on.
        parameters: of the student; None before it has been built.
        seconds: spent on this run, evaluations and checkpoints included, and what others did beside it left out.
        cpus, gpus: of a cluster, that were reserved for its process meanwhile; None of a run without one.
        evaluation: figures on the held-out records by name; None without such, or before the end.
        gap_closed: percent of the way from the sweep's student of the text alone to the teacher, see `compute_gaps`.
        student: folder of the finished student.
        error: why it failed.
        identity: what a finished run was, to compare with what is asked for.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    labels: dict[str, str]
    output: str
    stream: int
    status: Status = "planned"
    steps: int = 0
    all_steps: int
    skipped_steps: int = 0
    positions: int = 0
    parameters: int | None = None
    seconds: float = 0.0
    cpus: float | None = None
    gpus: float | None = None
    evaluation: dict[str, float] | None = None
    gap_closed: float | None = None
    student: str | None = None
    error: str | None = None
    identity: dict[str, Any] = {}


class ReadStore(BaseModel):
    """A store that the sweep reads, and the manifest that it reads it at."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    store: str
    manifest: int
    fingerprint: str


class _Content(BaseModel):
    """What of sweep.json is read again."""

    model_config = ConfigDict(extra="ignore")

    latest: dict[str, int]
    runs: list[RunResult]


class RunRecord(Protocol):
    """What the training of a group needs of a sweep's record."""

    @property
    def results(self) -> Mapping[str, RunResult]:
        """Of the group's runs, by name."""

    def find_settings(self, run: SweepRun) -> TrainSettings:
        """Settings of a run with the numbers of its manifests."""

    def update(self, name: str, **changes: Any) -> None:
        """Change what is known of a run."""

    def describe_run(self, settings: TrainSettings) -> dict[str, Any]:
        """What makes a run the one it is."""


class SweepRecord:
    """The file sweep.json of a sweep: read when the sweep starts, and replaced whenever a run has come further.

    Attributes:
        results: of every run, by name, in the sweep's order.
        stores: that are read, by URL and number of the manifest.
        latest: by URL, the number that stands for the latest manifest from the sweep's first start to its end.
    """

    def __init__(self, sweep: Sweep, groups: Sequence[Sequence[SweepRun]], processes: Processes) -> None:
        """Find what an earlier start of the sweep did, and open the stores at the manifests that it read.

        Raises:
            ConfigError: the file of an earlier start cannot be read.
            TrainingError: a run that is finished had other settings.
            StoreNotFoundError, CorruptShardError, OutsideError: a store cannot be opened.
        """
        self._sweep, self._processes = sweep, processes
        self._path = sweep.output / "sweep.json"
        before = _read(self._path)
        self.latest = dict(before.latest) if self._path.exists() else self._find_earlier_manifests()
        self.stores: dict[tuple[str, int | str], ReadStore] = {}
        self._settings = {run.name: self._pin(run.settings) for run in sweep.runs}
        results = {one.name: one for one in before.runs}
        self.results: dict[str, RunResult] = {}
        for stream, group in enumerate(groups):
            for run in group:
                self.results[run.name] = self._begin(run, stream, results.get(run.name))
        self.results = {run.name: self.results[run.name] for run in sweep.runs}
        processes.wait_for_all()  # every rank has read the file before the first one writes it
        self.write()

    def find_settings(self, run: SweepRun) -> TrainSettings:
        """Settings of a run with the numbers of its manifests."""
        return self._settings[run.name]

    def update(self, name: str, **changes: Any) -> None:
        """Change what is known of a run, and write it down."""
        self.results[name] = self.results[name].model_copy(update=changes)
        self.write()

    def finish(self, results: Sequence[RunResult], means: Sequence[BaseModel]) -> None:
        """Write down what all runs together say."""
        self.results = {one.name: one for one in results}
        self.write(means=[mean.model_dump() for mean in means])

    def write(self, **further: object) -> None:
        """Replace the file on rank 0; a process that is killed leaves the earlier one or this."""
        if self._processes.rank:
            return
        content = {
            "logitstore": __version__,
            "file": self._sweep.file,
            "sweep": self._sweep.content,
            "stores": [one.model_dump() for one in self.stores.values()],
            "latest": self.latest,
            "runs": [one.model_dump() for one in self.results.values()],
            **further,
        }
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_name(f".{self._path.name}.tmp")
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(content, file, indent=1, ensure_ascii=False, default=str)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)

    def describe_run(self, settings: TrainSettings) -> dict[str, Any]:
        """What makes a run the one it is: its settings, and what is in its stores."""
        asked = [(settings.store, settings.manifest)]
        asked += [(one.store, one.manifest) for one in settings.further_teachers]
        asked += [(one.store, one.manifest) for one in settings.further_corpora]
        fingerprints = [self.stores[one].fingerprint for one in asked]
        weights: dict[str, Any] = {
            "teacher_weights": list(settings.teacher_weights),
            "corpus_weights": list(settings.corpus_weights),
            **settings.model_dump(mode="json", include={"document_weights"}),
        }
        return {"stores": fingerprints, **weights, **describe_settings(settings)}

    def _find_earlier_manifests(self) -> dict[str, int]:
        """Where the file is gone beside runs that have begun: what their checkpoints say of the latest manifests."""
        found: dict[str, int] = {}
        begun = []
        for run in self._sweep.runs:
            checkpoint = find_latest_checkpoint(Path(run.settings.output) / "checkpoints")
            if checkpoint is None:
                continue
            begun.append(run.name)
            with suppress(TrainingError):  # which the run itself will fail with
                header = read_header(checkpoint)
                for url, number in _list_latest(run.settings, header):
                    found.setdefault(url, number)
        if begun and not self._processes.rank:
            _LOGGER.warning(
                "%s: expected it beside runs that have begun (%s), found none: they go on from their checkpoints, "
                "'latest' is the manifest that they began with, and finished ones are evaluated and saved again; to "
                "start anew, choose another output folder",
                self._path,
                ", ".join(begun),
            )
        return found

    def _begin(self, run: SweepRun, stream: int, before: RunResult | None) -> RunResult:
        settings = self._settings[run.name]
        values = {"name": run.name, "labels": dict(run.labels), "output": settings.output, "stream": stream}
        if before is None:
            return RunResult(**values, all_steps=settings.steps)
        if before.status != "finished":
            # It is tried again from its checkpoint; what it took so far goes on being counted.
            return RunResult(**values, all_steps=settings.steps, seconds=before.seconds)
        check_same_run(f"{self._path}: {run.name}", before.identity, self.describe_run(settings))
        if before.student is None or not Path(before.student).is_dir():
            return RunResult(**values, all_steps=settings.steps)
        return before.model_copy(update=values)

    def _pin(self, settings: TrainSettings) -> TrainSettings:
        """The settings with a number for every manifest that they ask for as the latest."""
        teachers = tuple(one.model_copy(update=self._open(one, settings)) for one in settings.further_teachers)
        corpora = tuple(one.model_copy(update=self._open(one, settings)) for one in settings.further_corpora)
        further = {"further_teachers": teachers, "further_corpora": corpora}
        return settings.model_copy(update={**self._open(settings, settings), **further})

    def _open(
        self, asked: TrainSettings | FurtherTeacherSettings | FurtherCorpusSettings, settings: TrainSettings
    ) -> dict[str, int]:
        number = self.latest.get(asked.store) if asked.manifest == "latest" else asked.manifest
        if number is None or (asked.store, number) not in self.stores:
            options = settings.storage_options if asked.storage_options is None else asked.storage_options
            store = LogitStore.open(asked.store, "latest" if number is None else number, options)
            assert store.manifest_number is not None  # only a live snapshot has none
            shared = self._processes.take_from_first(store.manifest_number)
            if shared != store.manifest_number:
                store = LogitStore.open(asked.store, shared, options)
            number = shared
            self.stores[asked.store, number] = ReadStore(
                store=asked.store, manifest=number, fingerprint=store.fingerprint
            )
        if asked.manifest == "latest":
            self.latest[asked.store] = number
        return {"manifest": number}


def _list_latest(settings: TrainSettings, header: CheckpointHeader) -> Iterator[tuple[str, int]]:
    """URLs of the stores whose latest manifest a run asked for, and the number that it began with."""
    numbers = [header.manifest_number, *header.further_manifests]
    teachers: list[TrainSettings | FurtherTeacherSettings] = [settings, *settings.further_teachers]
    for teacher, number in zip(teachers, numbers, strict=False):
        if teacher.manifest == "latest":
            yield teacher.store, number
    for corpus in settings.further_corpora:
        if corpus.manifest == "latest" and corpus.store in header.corpus_manifests:
            yield corpus.store, header.corpus_manifests[corpus.store]


def _read(path: Path) -> _Content:
    """What an earlier start left; nothing where there was none."""
    if not path.exists():
        return _Content(latest={}, runs=[])
    try:
        return _Content.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"{path}: expected what an earlier start of the sweep wrote, found {type(error).__name__}; delete it to "
            "begin again from the checkpoints of the runs, or choose another output folder"
        ) from error
