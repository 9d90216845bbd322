"""Hold a store to its word: recompute everything from bytes, and say what is wrong where."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from logitstore.errors import CorruptShardError, IncompatibleStoreError, LogitStoreError, StoreNotFoundError
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
from logitstore.store.manifest import Manifest, build_manifest_path, list_manifests, read_manifest, take_snapshot
from logitstore.store.plan import StorePlan, read_plan

# Shards verified at once: each holds one shard in memory.
PARALLEL_SHARDS = 2


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong: the object, what was found, and the command that mends it.

    `unit` is what has to be captured again, `damaged_manifest` the number of a manifest that nobody can read.
    """

    path: str
    what: str
    what_to_do: str
    unit: int | None = None
    damaged_manifest: int | None = None


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Outcome of `verify_store`.

    Attributes:
        units, units_planned: committed, and planned.
        quarantined: units that failed too often and are not committed. The store is without their records, and no
            problem is reported for them: a finished capture is not a complete one.
        records, positions, bytes: of the units that were recomputed and found right.
        problems: what is wrong.
    """

    units: int
    units_planned: int
    quarantined: int
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
        StoreNotFoundError, IncompatibleStoreError: there is no store to verify, or a program with another format
            version wrote it or a commit in it.
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
    quarantined = set(list_units(files, QUARANTINE)) - set(units)
    is_finished = len(units) + len(quarantined) >= num_units
    problems.extend(_verify_manifests(files, fingerprint, is_finished=is_finished, has_damaged_units=bool(problems)))
    return Verification(
        units=len(units),
        units_planned=num_units,
        quarantined=len(quarantined),
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
    except FileNotFoundError:  # taken back since it was listed
        return None, []
    except CorruptShardError as error:
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


def _verify_manifests(
    files: StoreFiles, fingerprint: str, *, is_finished: bool, has_damaged_units: bool
) -> Iterator[Problem]:
    """All manifests must be readable, and the newest one list what is committed: all of it, once the capture ended."""
    numbers = list_manifests(files)
    rebuild = f"run 'logitstore verify {files.url} --repair' to write a new manifest"
    newest: Manifest | None = None
    for number in numbers:
        path = build_manifest_path(number)
        newest = None
        try:
            newest = read_manifest(files, number)
        except CorruptShardError as error:
            remove = f"run 'logitstore verify {files.url} --repair' to write a new manifest and remove this one"
            yield Problem(path=path, what=str(error), what_to_do=remove, damaged_manifest=number)
        except IncompatibleStoreError as error:
            yield Problem(path=path, what=str(error), what_to_do="use the logitstore that wrote it")
        except StoreNotFoundError:  # removed by a repair since it was listed
            continue
    if has_damaged_units:  # their commits may be unreadable, and the next manifest will be without them
        return
    if not numbers and is_finished:
        yield Problem(path="manifest-*.parquet", what="there is no manifest yet", what_to_do=rebuild)
    if newest is None:
        return
    live = take_snapshot(files, fingerprint, None)
    if (what := _compare_manifests(newest, live, is_finished=is_finished)) is not None:
        yield Problem(path=build_manifest_path(numbers[-1]), what=what, what_to_do=rebuild)


def _compare_manifests(stored: Manifest, live: Manifest, *, is_finished: bool) -> str | None:
    if stored.plan_fingerprint != live.plan_fingerprint:
        return (
            f"lists another plan\n  in the manifest: {stored.plan_fingerprint}\n"
            f"  in plan.json:    {live.plan_fingerprint}"
        )
    listed = live.table
    if not is_finished:  # what was committed since belongs into the next manifest
        listed = listed.filter(pc.is_in(listed["unit"], pa.array(stored.units)))
    if stored.table.equals(listed):
        return None
    missing = sorted(set(live.units.tolist()) - set(stored.units.tolist()))
    surplus = sorted(set(stored.units.tolist()) - set(live.units.tolist()))
    if not missing and not surplus:
        return "its entries differ from the commits"
    return f"units committed but not listed: {missing[:10]}; listed but not committed: {surplus[:10]}"
