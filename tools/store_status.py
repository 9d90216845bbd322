"""Where a store stands: what is planned, committed, in flight and set aside, read without touching a capture."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from logitstore.settings import Settings
from logitstore.store.commit import COMMITS, UnitListing, list_unit_files, read_quarantine
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import Manifest, list_manifests, read_manifest, take_snapshot
from logitstore.store.plan import read_plan
from logitstore.store.running import HeardCapture, read_running

# Where no capture says its own pace, it is that of the newest commits: those of ten minutes, or fifty where they are
# fewer. It is not told once they are old, nor across a pause as long: nobody may have been capturing.
_PACE_COMMITS = 50
_PACE_SECONDS = 600.0
_PACE_STALE_SECONDS = 1800.0
# Actors outlive a killed driver a little; whoever commits later is a capture that says nothing of itself.
_PACE_AFTERMATH_SECONDS = 60.0


class SetAsideUnit(Settings):
    """A quarantined unit, and the error of its last attempt."""

    unit: int
    attempts: int
    error: str


class CaptureStatus(Settings):
    """The last word of a capture.

    Attributes:
        run: its name.
        driver: host and process of its driver.
        state: `silent` is a capture that was killed, most likely.
        phase: what it was at; loading the teacher, capturing, or finishing with a manifest.
        heard_seconds_ago: age of its word.
        error: what it ended with.
        actors_ready, actors_wanted: that take units, and that there are to be.
        units_in_flight: that are with an actor.
        units_captured, failures, actor_losses: of this run.
        actor_hangs: of the actors lost, those given up because a unit took them too long.
        positions_per_second: of late; None before there is anything to tell.
    """

    run: str
    driver: str
    state: Literal["at work", "silent", "ended"]
    phase: str
    heard_seconds_ago: float
    error: str | None
    actors_ready: int
    actors_wanted: int
    units_in_flight: int
    units_captured: int
    failures: int
    actor_losses: int
    actor_hangs: int
    positions_per_second: float | None


class StoreStatus(Settings):
    """Where a store stands.

    Attributes:
        store: its address.
        is_complete: whether every planned unit is committed.
        units_planned, units_committed, units_quarantined, units_left: left is neither committed nor quarantined.
        units_in_flight: that captures at work have given to actors; None where no capture says so.
        records, positions: of what is committed.
        bytes: of the committed shards.
        documents, recorded_documents, dead_letters: that the committed units saw; dead letters by reason.
        manifest: number of the newest manifest, None before the first.
        units_not_in_manifest: committed since it was written; readers do not see them yet.
        newest_commit_age_seconds: None where there is no commit, or the storage does not tell.
        units_per_hour, positions_per_second: of the captures at work as they say, else of the newest commits; None when
            nothing was committed of late.
        seconds_left: at that pace.
        captures: those that have left a word, the one heard last first.
        quarantine: the units set aside.
    """

    store: str
    is_complete: bool
    units_planned: int
    units_committed: int
    units_quarantined: int
    units_left: int
    units_in_flight: int | None
    records: int
    positions: int
    bytes: int
    documents: int
    recorded_documents: int
    dead_letters: dict[str, int]
    manifest: int | None
    units_not_in_manifest: int
    newest_commit_age_seconds: float | None
    units_per_hour: float | None
    positions_per_second: float | None
    seconds_left: float | None
    captures: tuple[CaptureStatus, ...]
    quarantine: tuple[SetAsideUnit, ...]

    @property
    def is_at_work(self) -> bool:
        """Whether a capture says that it is running."""
        return any(capture.state == "at work" for capture in self.captures)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to wait for."""
        return not self.units_left and not self.is_at_work


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast a store grows; both None where nobody can tell."""

    units_per_hour: float | None = None
    positions_per_second: float | None = None


def read_status(files: StoreFiles, *, now: float | None = None) -> StoreStatus:
    """Read where a store stands: a few listings, and the commits that no manifest lists yet.

    Args:
        files: the store.
        now: seconds since the epoch; the clock's by default.

    Raises:
        StoreNotFoundError, IncompatibleStoreError, CorruptShardError: there is no store, or it cannot be read.
        OutsideError: the storage failed.
    """
    return StatusReader(files).read(now=now)


class StatusReader:
    """Reads where a store stands again and again: each time the commits that are new since."""

    def __init__(self, files: StoreFiles) -> None:
        self._files = files
        self._newest: Manifest | None = None
        self._snapshot: Manifest | None = None

    def read(self, *, now: float | None = None) -> StoreStatus:
        """Where the store stands now; see `read_status`."""
        now = time.time() if now is None else now
        files = self._files
        plan = read_plan(files)
        self._read_newest_manifest()
        heard = read_running(files)  # before the commits: what was in flight then and is committed now is not in flight
        listing = list_unit_files(files, COMMITS)
        snapshot = take_snapshot(files, plan.compute_fingerprint(), self._snapshot or self._newest, listing=listing)
        self._snapshot = snapshot
        statistics = LogitStore(files, plan, snapshot).compute_statistics()
        planned = len(plan.build_unit_table())
        committed = set(snapshot.units.tolist())
        set_aside = [entry for entry in read_quarantine(files) if entry.unit not in committed]
        left = planned - len(committed) - len(set_aside)
        newest_commit = listing.modified.max(initial=0.0)
        pace = find_pace(heard, listing, statistics.positions, now)
        return StoreStatus(
            store=files.url,
            is_complete=len(committed) >= planned,
            units_planned=planned,
            units_committed=len(committed),
            units_quarantined=len(set_aside),
            units_left=left,
            units_in_flight=count_in_flight(heard, committed, now),
            records=statistics.records,
            positions=statistics.positions,
            bytes=statistics.bytes,
            documents=statistics.documents,
            recorded_documents=statistics.recorded_documents,
            dead_letters=statistics.dead_letters,
            manifest=self._newest.number if self._newest else None,
            units_not_in_manifest=len(committed - set(self._newest.units.tolist() if self._newest else ())),
            newest_commit_age_seconds=max(0.0, now - newest_commit) if newest_commit else None,
            units_per_hour=pace.units_per_hour,
            positions_per_second=pace.positions_per_second,
            seconds_left=3600 * left / pace.units_per_hour if pace.units_per_hour and left else None,
            captures=tuple(_describe_capture(entry, now) for entry in heard),
            quarantine=tuple(SetAsideUnit(unit=e.unit, attempts=e.attempts, error=e.error) for e in set_aside),
        )

    def _read_newest_manifest(self) -> None:
        numbers = list_manifests(self._files)
        if numbers and (self._newest is None or numbers[-1] != self._newest.number):
            self._newest = read_manifest(self._files, numbers[-1])
            self._snapshot = None


def count_in_flight(heard: Sequence[HeardCapture], committed: set[int], now: float) -> int | None:
    """Units that captures at work have given to actors and that are not committed; None where no capture says so."""
    at_work = [entry.capture for entry in heard if entry.is_at_work(now)]
    if not at_work:
        return None
    return len({unit for capture in at_work for unit in capture.units_in_flight} - committed)


def find_pace(heard: Sequence[HeardCapture], listing: UnitListing, positions: int, now: float) -> Pace:
    """What the captures at work say of their pace, all together; else what the times of the commits say."""
    at_work = [entry.capture for entry in heard if entry.is_at_work(now)]
    rates = [(one.units_per_second, one.positions_per_second or 0.0) for one in at_work if one.units_per_second]
    if rates:
        units_per_second, positions_per_second = (sum(column) for column in zip(*rates, strict=True))
        return Pace(units_per_hour=3600 * units_per_second, positions_per_second=positions_per_second)
    times = np.sort(listing.modified[listing.modified > 0])
    if heard and not at_work and (not len(times) or times[-1] <= heard[0].heard + _PACE_AFTERMATH_SECONDS):
        return Pace()
    units_per_hour = compute_pace(times, now)
    if units_per_hour is None:
        return Pace()
    positions_per_unit = positions / max(1, len(listing.units))
    return Pace(units_per_hour=units_per_hour, positions_per_second=units_per_hour * positions_per_unit / 3600)


def compute_pace(commit_times: np.ndarray, now: float) -> float | None:
    """Units per hour over the newest commits; None where they are few, or too old to speak of the present.

    Args:
        commit_times: [U] float64, seconds since the epoch, ascending.
        now: likewise.
    """
    if not len(commit_times) or now - commit_times[-1] > _PACE_STALE_SECONDS:
        return None
    late = int(np.searchsorted(commit_times, commit_times[-1] - _PACE_SECONDS))
    recent = commit_times[min(late, max(0, len(commit_times) - _PACE_COMMITS)) :]
    pauses = np.flatnonzero(np.diff(recent) > _PACE_STALE_SECONDS)
    recent = recent[pauses[-1] + 1 :] if len(pauses) else recent
    if len(recent) < 2 or recent[-1] <= recent[0]:
        return None
    return float(3600 * (len(recent) - 1) / (recent[-1] - recent[0]))


def _describe_capture(heard: HeardCapture, now: float) -> CaptureStatus:
    capture = heard.capture
    is_at_work = heard.is_at_work(now)
    return CaptureStatus(
        run=capture.run,
        driver=f"{capture.host}:{capture.process}",
        state="ended" if capture.phase == "ended" else "at work" if is_at_work else "silent",
        phase=capture.phase,
        heard_seconds_ago=heard.compute_silence(now),
        error=capture.error,
        actors_ready=capture.actors_ready,
        actors_wanted=capture.actors_wanted,
        units_in_flight=len(capture.units_in_flight),
        units_captured=capture.units_captured,
        failures=capture.failures,
        actor_losses=capture.actor_losses,
        actor_hangs=capture.actor_hangs,
        positions_per_second=capture.positions_per_second if is_at_work else None,
    )
