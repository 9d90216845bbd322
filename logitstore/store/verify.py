"""Hold a store to its word: recompute everything from bytes, say what is wrong where, and mend what can be mended."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from logitstore.errors import CorruptShardError, IncompatibleStoreError, LogitStoreError
from logitstore.shard.invariants import find_violations
from logitstore.shard.layout import DOCUMENT_COLUMNS, SIGNAL_COLUMNS
from logitstore.shard.reader import decode_row_group, read_footer
from logitstore.shard.summary import RowGroup, compute_row_group_statistics
from logitstore.store.commit import (
    COMMITS,
    DATA,
    QUARANTINE,
    Commit,
    build_commit_path,
    list_units,
    parse_commit,
)
from logitstore.store.files import StoredFile, StoreFiles
from logitstore.store.manifest import Manifest, list_manifests, read_manifest, take_snapshot, write_manifest
from logitstore.store.plan import StorePlan, read_plan

# Shards verified at once: each holds one shard in memory.
PARALLEL_SHARDS = 2
DEFAULT_GRACE_SECONDS = 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong: the object, what was found, and the command that mends it."""

    path: str
    what: str
    what_to_do: str
    unit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Outcome of `verify_store`; the counts are of what was recomputed and found right."""

    units: int
    units_planned: int
    records: int
    positions: int
    bytes: int
    problems: tuple[Problem, ...]

    @property
    def is_clean(self) -> bool:
        return not self.problems


def verify_store(
    files: StoreFiles, *, quick: bool = False, report: Callable[[int, int], None] | None = None
) -> Verification:
    """Check commits, shards and manifests of a store against one another and against the bytes.

    Args:
        files: the store.
        quick: only metadata: commits, sizes and manifests; no shard is read.
        report: called with (units done, units committed) as the work goes on.
    Raises:
        StoreNotFoundError, IncompatibleStoreError: there is no store to verify, or it is not readable at all.
    """
    plan = read_plan(files)
    fingerprint = plan.compute_fingerprint()
    num_units = len(plan.build_unit_table())
    units = list_units(files, COMMITS)
    sizes = {f"{DATA}/{file.name}": file for file in files.list(DATA)}
    problems: list[Problem] = []
    records = positions = num_bytes = 0

    def verify_unit(unit: int) -> tuple[Commit | None, list[Problem]]:
        return _verify_unit(files, plan, fingerprint, unit, num_units, sizes, quick=quick)

    with ThreadPoolExecutor(PARALLEL_SHARDS) as pool:
        for done, (commit, found) in enumerate(pool.map(verify_unit, units), start=1):
            problems.extend(found)
            if commit is not None and commit.shard is not None and not found:
                records += commit.shard.records
                positions += commit.shard.positions
                num_bytes += commit.shard.bytes
            if report is not None:
                report(done, len(units))
    if not problems:
        is_finished = len(set(units) | set(list_units(files, QUARANTINE))) >= num_units
        problems.extend(_verify_manifest(files, fingerprint, is_finished=is_finished))
    return Verification(
        units=len(units),
        units_planned=num_units,
        records=records,
        positions=positions,
        bytes=num_bytes,
        problems=tuple(problems),
    )


def _verify_unit(
    files: StoreFiles,
    plan: StorePlan,
    fingerprint: str,
    unit: int,
    num_units: int,
    sizes: dict[str, StoredFile],
    *,
    quick: bool,
) -> tuple[Commit | None, list[Problem]]:
    path = build_commit_path(unit)
    requeue = f"run 'logitstore verify {files.url} --repair', then 'logitstore capture' to capture unit {unit} again"

    def problem(where: str, what: str) -> Problem:
        return Problem(path=where, what=what, what_to_do=requeue, unit=unit)

    try:
        commit = parse_commit(files.read(path), path)
    except (CorruptShardError, FileNotFoundError) as error:
        return None, [problem(path, str(error))]
    found = [problem(path, what) for what in _find_commit_problems(commit, fingerprint, unit, num_units)]
    if commit.file is None or commit.shard is None or found:
        return commit, found
    stored = sizes.get(commit.file)
    if stored is None:
        return commit, [problem(commit.file, "the commit names this file, and it is not there")]
    if stored.bytes != commit.shard.bytes:
        what = f"expected {commit.shard.bytes} bytes, found {stored.bytes}"
        return commit, [problem(commit.file, what)]
    if quick:
        return commit, []
    return commit, [problem(commit.file, what) for what in _find_shard_problems(files, plan, fingerprint, commit)]


def _find_commit_problems(commit: Commit, fingerprint: str, unit: int, num_units: int) -> Iterator[str]:
    if commit.plan_fingerprint != fingerprint:
        yield f"belongs to another plan\n  in the commit: {commit.plan_fingerprint}\n  in plan.json:  {fingerprint}"
    if commit.unit != unit:
        yield f"expected the commit of unit {unit}, found that of unit {commit.unit}"
    if unit >= num_units:
        yield f"expected units below {num_units}, found unit {unit}"
    if (imbalance := commit.find_imbalance()) is not None:
        yield f"documents do not add up: {imbalance}"


def _find_shard_problems(files: StoreFiles, plan: StorePlan, fingerprint: str, commit: Commit) -> Iterator[str]:
    """Everything wrong with the bytes of a committed shard, row group by row group."""
    assert commit.file is not None
    assert commit.shard is not None
    data = files.read(commit.file)
    shard = commit.shard
    footer = data[shard.footer_offset :]
    if hashlib.sha256(footer).hexdigest() != shard.footer_sha256:
        yield "footer: the bytes are not the ones that were committed"
        return
    try:
        metadata, header = read_footer(footer, commit.file)
    except LogitStoreError as error:
        yield f"footer: {error}"
        return
    if (header.plan_fingerprint, header.unit) != (fingerprint, commit.unit):
        yield f"expected unit {commit.unit} of this plan, found unit {header.unit} of plan {header.plan_fingerprint}"
    intact = True
    starts = itertools.accumulate((row_group.records for row_group in shard.row_groups), initial=0)
    for index, (start, row_group) in enumerate(zip(starts, shard.row_groups, strict=False)):
        part = data[row_group.offset : row_group.offset + row_group.bytes]
        if hashlib.sha256(part).hexdigest() != row_group.sha256:
            yield f"row group {index}: the bytes are not the ones that were committed"
            intact = False
            continue
        columns = SIGNAL_COLUMNS + DOCUMENT_COLUMNS
        try:
            batch = decode_row_group(metadata, index, row_group.offset, part, columns, commit.file)
        except CorruptShardError as error:
            yield str(error)
            continue
        for violation in find_violations(batch, vocab_size=plan.teacher.vocab_size, codec=plan.shard.codec):
            yield f"row group {index}, {violation}"
        expected_indices = range(start, start + row_group.records)
        if batch.indices.tolist() != list(expected_indices) or set(batch.units.tolist()) != {commit.unit}:
            yield f"row group {index}: records are not numbered {expected_indices} of unit {commit.unit}"
        yield from _compare_statistics(index, row_group, compute_row_group_statistics(batch))
    if intact and hashlib.sha256(data).hexdigest() != shard.sha256:
        yield "the file's bytes are not the ones that were committed (outside row groups and footer)"


def _compare_statistics(index: int, committed: RowGroup, found: dict[str, object]) -> Iterator[str]:
    for name, value in found.items():
        expected = getattr(committed, name)
        is_close = (
            abs(value - expected) <= 1e-6 * (1 + abs(expected)) if isinstance(value, float) else value == expected
        )
        if not is_close:
            yield f"row group {index}: {name}: the commit says {expected}, the bytes say {value}"


def _verify_manifest(files: StoreFiles, fingerprint: str, *, is_finished: bool) -> Iterator[Problem]:
    """The newest manifest must be readable and list what is committed: all of it, once the capture is finished."""
    numbers = list_manifests(files)
    rebuild = f"run 'logitstore verify {files.url} --repair' to write a new manifest"
    live = take_snapshot(files, fingerprint, None)
    if not numbers and not is_finished:
        return
    if not numbers:
        yield Problem(path="manifest-*.parquet", what="there is no manifest yet", what_to_do=rebuild)
        return
    path = f"manifest-{numbers[-1]:06d}.parquet"
    try:
        stored = read_manifest(files, numbers[-1])
    except (CorruptShardError, IncompatibleStoreError) as error:
        yield Problem(path=path, what=str(error), what_to_do=rebuild)
        return
    if (what := _compare_manifests(stored, live, is_finished=is_finished)) is not None:
        yield Problem(path=path, what=what, what_to_do=rebuild)


def _compare_manifests(stored: Manifest, live: Manifest, *, is_finished: bool) -> str | None:
    if stored.plan_fingerprint != live.plan_fingerprint:
        return (
            f"lists another plan\n  in the manifest: {stored.plan_fingerprint}\n"
            f"  in plan.json:    {live.plan_fingerprint}"
        )
    listed = live.table
    if not is_finished:  # what was committed since belongs into the next manifest
        listed = listed.filter(pc.is_in(listed["unit"], pa.array(stored.units)))
    if stored.table.combine_chunks().equals(listed.combine_chunks()):
        return None
    missing = sorted(set(live.units.tolist()) - set(stored.units.tolist()))
    surplus = sorted(set(stored.units.tolist()) - set(live.units.tolist()))
    if not missing and not surplus:
        return "its entries differ from the commits"
    return f"units committed but not listed: {missing[:10]}; listed but not committed: {surplus[:10]}"


def repair_store(files: StoreFiles, verification: Verification) -> list[int]:
    """Take the commits of damaged units back, so that the next capture does them again, and write a new manifest.

    Returns the units that have to be captured again. Shards are left to garbage collection.
    """
    damaged = sorted({problem.unit for problem in verification.problems if problem.unit is not None})
    for unit in damaged:
        files.delete(build_commit_path(unit))
    write_manifest(files, read_plan(files).compute_fingerprint())
    return damaged


def find_garbage(
    files: StoreFiles, *, grace_seconds: float = DEFAULT_GRACE_SECONDS, now: float | None = None
) -> list[StoredFile]:
    """Data files that no commit and no manifest names and that are older than the grace period.

    A running capture uploads a shard before it commits it: the grace period keeps those. A file of unknown age is kept.
    """
    now = time.time() if now is None else now
    garbage = [file for file in files.list(DATA) if file.modified is not None and file.modified < now - grace_seconds]
    if not garbage:
        return []
    fingerprint = read_plan(files).compute_fingerprint()
    referenced = set(take_snapshot(files, fingerprint, None).table["file"].to_pylist())
    for number in list_manifests(files):  # a pinned manifest must stay readable
        referenced.update(read_manifest(files, number).table["file"].to_pylist())
    return [file for file in garbage if f"{DATA}/{file.name}" not in referenced]


def delete_garbage(files: StoreFiles, garbage: list[StoredFile]) -> None:
    """Delete what `find_garbage` found."""
    for file in garbage:
        files.delete(f"{DATA}/{file.name}")
