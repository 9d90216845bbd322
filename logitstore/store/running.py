"""What a capture at work says of itself in its store: one small object, replaced while the capture runs.

Commits tell what is done; only the capture knows what it has begun. Its word is for people: no record, commit or
manifest depends on it, whoever reads a store may ignore it, and anybody may delete it. A capture that is killed leaves
its last word behind, so silence is judged by the reader.
"""

from __future__ import annotations

import datetime
import logging
from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict, ValidationError

from logitstore.settings import Settings
from logitstore.shard.layout import FORMAT_VERSION
from logitstore.store.files import StoreFiles
from logitstore.store.sealed_json import BrokenSealError, seal, unseal

RUNNING = "running"
# A word is missed now and then; a capture that misses four, or is quiet for a minute, is not at work any more.
_MISSED_WORDS = 4
_LEAST_SILENCE_SECONDS = 60.0
_LOG = logging.getLogger(__name__)


class RunningCapture(Settings):
    """What `running/<run>.json` holds, as of `written_at`.

    Attributes:
        run: name of this run of a capture that no other run has.
        host, process: where its driver runs.
        started_at, written_at: by the driver's clock.
        seconds_between: it is written this often.
        phase: what the driver is at; `ended` where it has ended with an error.
        error: what it ended with.
        actors_ready, actors_wanted: that take units, and that there are to be.
        units_in_flight: units that are with an actor, ascending.
        units_captured, lost_races, positions, failures, actor_losses: of this run, so far.
        actor_hangs: of the actors lost, those that were given up because a unit took them too long.
        units_per_second, positions_per_second: of late; None before there is anything to tell.
    """

    # A later program may say more; what this one reads of it is true all the same.
    model_config = ConfigDict(extra="ignore")

    format_version: int = FORMAT_VERSION
    run: str
    host: str
    process: int
    started_at: datetime.datetime
    written_at: datetime.datetime
    seconds_between: float
    phase: Literal["loading", "capturing", "finishing", "ended"]
    error: str | None = None
    actors_ready: int = 0
    actors_wanted: int = 0
    units_in_flight: tuple[int, ...] = ()
    units_captured: int = 0
    lost_races: int = 0
    positions: int = 0
    failures: int = 0
    actor_losses: int = 0
    actor_hangs: int = 0
    units_per_second: float | None = None
    positions_per_second: float | None = None


@dataclass(frozen=True, kw_only=True)
class HeardCapture:
    """A capture's last word, and when it was heard: by the storage's clock where that tells, else by the driver's."""

    capture: RunningCapture
    heard: float

    def compute_silence(self, now: float) -> float:
        """Seconds since it was heard; `now` in seconds since the epoch."""
        return max(0.0, now - self.heard)

    def is_at_work(self, now: float) -> bool:
        """Whether it may be taken to be running: it has not ended, and was heard of late."""
        patience = max(_LEAST_SILENCE_SECONDS, _MISSED_WORDS * self.capture.seconds_between)
        return self.capture.phase != "ended" and self.compute_silence(now) <= patience


def build_running_path(run: str) -> str:
    return f"{RUNNING}/{run}.json"


def write_running(files: StoreFiles, capture: RunningCapture) -> None:
    """Replace a capture's word.

    Raises:
        OutsideError: the storage failed.
    """
    files.put(build_running_path(capture.run), seal(capture.model_dump_json().encode()))


def read_running(files: StoreFiles) -> list[HeardCapture]:
    """The last word of every capture that has left one, the one heard last first.

    What cannot be read is left out: it concerns nobody's records, and its capture will say it again.

    Raises:
        OutsideError: the storage failed.
    """
    modified = {f"{RUNNING}/{file.name}": file.modified for file in files.list(RUNNING)}
    heard = []
    for path, data in files.read_existing(list(modified)):
        try:
            capture = RunningCapture.model_validate_json(unseal(data))
        except (BrokenSealError, ValidationError) as error:
            _LOG.debug("%s/%s is no word of a capture: %s", files.url, path, error)
            continue
        if path == build_running_path(capture.run):
            time = modified[path]
            heard.append(HeardCapture(capture=capture, heard=time or capture.written_at.timestamp()))
    return sorted(heard, key=lambda entry: entry.heard, reverse=True)


def delete_running(files: StoreFiles, run: str) -> None:
    """Take a capture's word back; none is fine.

    Raises:
        OutsideError: the storage failed.
    """
    files.delete(build_running_path(run))
