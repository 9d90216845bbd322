"""Where a store stands: what is planned, committed and set aside, read without touching a capture that runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from logitstore.settings import Settings
from logitstore.store.commit import COMMITS, read_quarantine
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import list_manifests, read_manifest, take_snapshot
from logitstore.store.plan import read_plan
from tools.look import (
    build_facts,
    build_table,
    count_things,
    draw_bar,
    format_bytes,
    format_count,
    format_seconds,
    format_share,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

# The pace is that of the newest commits. It is not told once they are old: nobody may be capturing any more.
_PACE_COMMITS = 50
_PACE_STALE_SECONDS = 1800.0
_ERROR_CHARACTERS = 300


class SetAsideUnit(Settings):
    """A quarantined unit, and the error of its last attempt."""

    unit: int
    attempts: int
    error: str


class StoreStatus(Settings):
    """Where a store stands.

    Attributes:
        store: its address.
        is_complete: whether every planned unit is committed.
        units_planned, units_committed, units_quarantined, units_left: left is neither committed nor quarantined.
        records, positions: of what is committed.
        bytes: of the committed shards.
        documents, recorded_documents, dead_letters: that the committed units saw; dead letters by reason.
        manifest: number of the newest manifest, None before the first.
        units_not_in_manifest: committed since it was written; readers do not see them yet.
        newest_commit_age_seconds: None where there is no commit, or the storage does not tell.
        units_per_hour: pace of the newest commits, None when nothing was committed of late.
        seconds_left: at that pace.
        quarantine: the units set aside.
    """

    store: str
    is_complete: bool
    units_planned: int
    units_committed: int
    units_quarantined: int
    units_left: int
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
    seconds_left: float | None
    quarantine: tuple[SetAsideUnit, ...]


def read_status(files: StoreFiles, *, now: float | None = None) -> StoreStatus:
    """Read where a store stands: a few listings, and the commits that no manifest lists yet.

    Args:
        files: the store.
        now: seconds since the epoch; the clock's by default.

    Raises:
        StoreNotFoundError, IncompatibleStoreError, CorruptShardError: there is no store, or it cannot be read.
    """
    now = time.time() if now is None else now
    plan = read_plan(files)
    planned = len(plan.build_unit_table())
    numbers = list_manifests(files)
    newest = read_manifest(files, numbers[-1]) if numbers else None
    snapshot = take_snapshot(files, plan.compute_fingerprint(), newest)
    statistics = LogitStore(files, plan, snapshot).compute_statistics()
    committed = set(snapshot.units.tolist())
    set_aside = [entry for entry in read_quarantine(files) if entry.unit not in committed]
    left = planned - len(committed) - len(set_aside)
    times = sorted(file.modified for file in files.list(COMMITS) if file.modified is not None)
    units_per_hour = compute_pace(times, now)
    return StoreStatus(
        store=files.url,
        is_complete=len(committed) >= planned,
        units_planned=planned,
        units_committed=len(committed),
        units_quarantined=len(set_aside),
        units_left=left,
        records=statistics.records,
        positions=statistics.positions,
        bytes=statistics.bytes,
        documents=statistics.documents,
        recorded_documents=statistics.recorded_documents,
        dead_letters=statistics.dead_letters,
        manifest=newest.number if newest else None,
        units_not_in_manifest=len(committed - set(newest.units.tolist() if newest else ())),
        newest_commit_age_seconds=max(0.0, now - times[-1]) if times else None,
        units_per_hour=units_per_hour,
        seconds_left=3600 * left / units_per_hour if units_per_hour and left else None,
        quarantine=tuple(SetAsideUnit(unit=e.unit, attempts=e.attempts, error=e.error) for e in set_aside),
    )


def compute_pace(commit_times: Sequence[float], now: float) -> float | None:
    """Units per hour over the newest commits; None where they are few, or too old to speak of the present.

    Args:
        commit_times: seconds since the epoch, ascending.
        now: likewise.
    """
    recent = commit_times[-_PACE_COMMITS:]
    if len(recent) < 2 or now - recent[-1] > _PACE_STALE_SECONDS or recent[-1] <= recent[0]:
        return None
    return 3600 * (len(recent) - 1) / (recent[-1] - recent[0])


def render_status(status: StoreStatus) -> list[RenderableType]:
    """What `logitstore status` shows."""
    share = status.units_committed / max(1, status.units_planned)
    parts: list[RenderableType] = [
        build_facts(
            [
                ("store", status.store),
                ("progress", f"{draw_bar(share, rest='░')} {format_share(share)}"),
                ("units", _describe_units(status)),
                ("pace", _describe_pace(status)),
                ("last commit", _describe_age(status.newest_commit_age_seconds)),
                ("records", f"{format_count(status.records)}, {format_count(status.positions)} positions"),
                ("bytes", _describe_bytes(status)),
                ("documents", describe_documents(status.documents, status.dead_letters)),
                ("manifest", _describe_manifest(status)),
                ("next", _describe_next(status)),
            ]
        )
    ]
    if status.quarantine:
        rows = [
            (entry.unit, entry.attempts, entry.error.partition("\n")[0][:_ERROR_CHARACTERS])
            for entry in status.quarantine
        ]
        parts.append(build_table("Units set aside", ["#unit", "#attempts", "last error"], rows))
    return parts


def describe_documents(documents: int, dead_letters: dict[str, int]) -> str:
    """Documents read, and how many of them could not be used and why: '1,000 read, 2 dead letters (2 empty)'."""
    reasons = ", ".join(f"{format_count(count)} {reason}" for reason, count in dead_letters.items() if count)
    dead = sum(dead_letters.values())
    return f"{format_count(documents)} read, {count_things(dead, 'dead letter')}" + (f" ({reasons})" if reasons else "")


def _describe_units(status: StoreStatus) -> str:
    parts = [f"{format_count(status.units_committed)} of {format_count(status.units_planned)} committed"]
    if status.units_left:
        parts.append(f"{format_count(status.units_left)} to do")
    if status.units_quarantined:
        parts.append(f"{format_count(status.units_quarantined)} set aside")
    return ", ".join(parts)


def _describe_pace(status: StoreStatus) -> str | None:
    if status.units_per_hour is None or status.is_complete:
        return None
    left = "" if status.seconds_left is None else f", {format_seconds(status.seconds_left)} left"
    return f"{format_count(status.units_per_hour)} units per hour{left}"


def _describe_age(age: float | None) -> str | None:
    return None if age is None else f"{format_seconds(age)} ago"


def _describe_bytes(status: StoreStatus) -> str:
    if not status.positions:
        return format_bytes(status.bytes)
    return f"{format_bytes(status.bytes)} of shards, {status.bytes / status.positions:.1f} per position"


def _describe_manifest(status: StoreStatus) -> str:
    if status.manifest is None:
        return "none yet: it is written when a capture ends"
    newer = status.units_not_in_manifest
    return str(status.manifest) + (f" ({count_things(newer, 'newer unit')} not in it yet)" if newer else "")


def _describe_next(status: StoreStatus) -> str:
    if status.units_left:
        return "'logitstore capture CAPTURE.yaml' goes on with the rest, unless it is running already"
    if status.units_quarantined:
        return "'logitstore capture CAPTURE.yaml --retry-quarantined' tries the units set aside again"
    if status.units_not_in_manifest:
        return f"'logitstore verify {status.store} --repair' writes a manifest"
    return f"'logitstore verify {status.store}', then 'logitstore train TRAIN.yaml'"
