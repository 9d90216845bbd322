"""What `logitstore status` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from tools.store_status import CaptureStatus, StoreStatus

if TYPE_CHECKING:
    from rich.console import RenderableType

_ERROR_CHARACTERS = 300


def render_status(status: StoreStatus) -> list[RenderableType]:
    """Facts about the store, the captures that have left a word, and the units set aside."""
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
    # Of a store that is whole, nobody wants to know what once befell it.
    captures = [capture for capture in status.captures if status.units_left or capture.state == "at work"]
    if captures:
        columns = ["captures", "", "#heard", "#actors", "#in flight", "#captured", "#positions/s", "trouble"]
        parts.append(build_table(None, columns, [_describe_capture(capture) for capture in captures]))
    if status.quarantine:
        rows = [
            (entry.unit, entry.attempts, entry.error.partition("\n")[0][:_ERROR_CHARACTERS])
            for entry in status.quarantine
        ]
        parts.append(build_table("Units set aside", ["#unit", "#attempts", "last error"], rows))
    return parts


def describe_in_one_line(status: StoreStatus) -> str:
    """The same in a line of a log, as far as it changes."""
    parts = [_describe_units(status), _describe_pace(status)]
    dead = sum(status.dead_letters.values())
    failures = sum(capture.failures for capture in status.captures if capture.state == "at work")
    at_work = [capture for capture in status.captures if capture.state == "at work"]
    if at_work:
        ready, wanted = (sum(getattr(one, name) for one in at_work) for name in ("actors_ready", "actors_wanted"))
        parts.append(f"{ready}/{wanted} actors")
    elif status.captures and status.units_left:
        parts.append("no capture at work")
    parts += [
        count_things(dead, "dead letter") if dead else None,
        count_things(failures, "failure") if failures else None,
    ]
    return ", ".join(part for part in parts if part)


def describe_documents(documents: int, dead_letters: dict[str, int]) -> str:
    """Documents read, and how many of them could not be used and why: '1,000 read, 2 dead letters (2 empty)'."""
    reasons = ", ".join(f"{format_count(count)} {reason}" for reason, count in dead_letters.items() if count)
    dead = sum(dead_letters.values())
    return f"{format_count(documents)} read, {count_things(dead, 'dead letter')}" + (f" ({reasons})" if reasons else "")


def _describe_capture(capture: CaptureStatus) -> tuple[object, ...]:
    state = capture.phase if capture.state == "at work" else capture.state
    rate = "" if capture.positions_per_second is None else format_count(capture.positions_per_second)
    return (
        capture.driver,
        {"loading": "loads the teacher", "finishing": "writes the manifest"}.get(state, state),
        f"{format_seconds(capture.heard_seconds_ago)} ago",
        f"{capture.actors_ready}/{capture.actors_wanted}" if capture.state == "at work" else "",
        capture.units_in_flight if capture.state == "at work" else "",
        format_count(capture.units_captured),
        rate,
        _describe_trouble(capture),
    )


def _describe_trouble(capture: CaptureStatus) -> str:
    """Failures and losses of a run, and what it ended with."""
    counts = {"failure": capture.failures, "lost actor": capture.actor_losses, "hanging actor": capture.actor_hangs}
    parts = [count_things(count, what) for what, count in counts.items() if count]
    if capture.state == "silent":
        parts.append("killed, most likely")
    if capture.error is not None:
        parts.append(capture.error.partition("\n")[0][:_ERROR_CHARACTERS])
    return ", ".join(parts)


def _describe_units(status: StoreStatus) -> str:
    parts = [f"{format_count(status.units_committed)} of {format_count(status.units_planned)} committed"]
    if status.units_left:
        parts.append(f"{format_count(status.units_left)} to do")
    if status.units_in_flight:
        parts.append(f"{format_count(status.units_in_flight)} of them in flight")
    if status.units_quarantined:
        parts.append(f"{format_count(status.units_quarantined)} set aside")
    return ", ".join(parts)


def _describe_pace(status: StoreStatus) -> str | None:
    if status.units_per_hour is None or status.is_complete:
        return None
    rate = "" if status.positions_per_second is None else f"{format_count(status.positions_per_second)} positions/s, "
    left = "" if status.seconds_left is None else f", {format_seconds(status.seconds_left)} left"
    return f"{rate}{format_count(status.units_per_hour)} units per hour{left}"


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
    if status.is_at_work:
        return f"a capture is at work; 'logitstore status {status.store} --watch' follows it"
    if status.units_left:
        # Captures may keep silent about themselves.
        doubt = "" if status.captures else ", unless it is running already"
        return f"'logitstore capture CAPTURE.yaml' goes on with the rest{doubt}"
    if status.units_quarantined:
        return "'logitstore capture CAPTURE.yaml --retry-quarantined' tries the units set aside again"
    if status.units_not_in_manifest:
        return f"'logitstore verify {status.store} --repair' writes a manifest"
    return f"'logitstore verify {status.store}', then 'logitstore train TRAIN.yaml'"
