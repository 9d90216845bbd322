"""Commit records: the one act that makes a captured unit part of the store, exactly once.

A shard is uploaded under a name of its own (unit and attempt) and means nothing until `commits/<unit>.json` names it.
That object is create-only, so of several attempts the first one wins and the others are garbage. A kill before the
commit leaves garbage; a kill after it leaves a finished unit.
"""

from __future__ import annotations

import json
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from pydantic import ValidationError

from logitstore.corpus.documents import DeadLetter
from logitstore.errors import CorruptShardError, IncompatibleStoreError
from logitstore.settings import Settings
from logitstore.shard.layout import FORMAT_VERSION
from logitstore.shard.summary import ShardSummary
from logitstore.store.create_only import create_or_read_back
from logitstore.store.files import StoreFiles
from logitstore.store.sealed_json import BrokenSealError, NotSealedError, seal, unseal

COMMITS = "commits"
DATA = "data"
QUARANTINE = "quarantine"
_UNIT_NAME = re.compile(r"(\d{7}|[1-9]\d{7,})\.json")
# Dead letters listed one by one in a commit; the counts always hold all of them.
LISTED_DEAD_LETTERS = 1000
_PATHS_AT_A_TIME = 8192
_VERIFY = "run 'logitstore verify'"


class Commit(Settings):
    """What `commits/<unit>.json` holds. `shard` and `file` are absent where every document was a dead letter."""

    format_version: int = FORMAT_VERSION
    plan_fingerprint: str
    unit: int
    source: str
    attempt: str
    file: str | None
    shard: ShardSummary | None
    documents: int
    recorded_documents: int
    dead_letter_counts: dict[str, int]
    dead_letters: tuple[DeadLetter, ...]
    engine: str
    created_by: str = ""
    seconds: float

    def find_imbalance(self) -> str | None:
        """What does not add up in the counts, or None."""
        dead = sum(self.dead_letter_counts.values())
        if self.documents != self.recorded_documents + dead:
            return f"{self.documents} documents, but {self.recorded_documents} recorded and {dead} dead letters"
        if (self.file is None) != (self.shard is None):
            return "file and shard summary must both be there or both be absent"
        return None


class QuarantinedUnit(Settings):
    """What `quarantine/<unit>.json` holds: a unit that failed too often to try again unasked."""

    unit: int
    attempts: int
    error: str


class Outcome(StrEnum):
    """Of an attempt to commit: ours is the unit's shard, or another attempt's is."""

    WON = "won"
    LOST = "lost"


def build_attempt() -> str:
    """A name for one attempt at a unit that no other attempt anywhere has."""
    return uuid.uuid4().hex[:16]


def build_data_path(unit: int, attempt: str) -> str:
    return f"{DATA}/{unit:07d}-{attempt}.parquet"


def build_commit_path(unit: int) -> str:
    return f"{COMMITS}/{unit:07d}.json"


def parse_commit_path(path: str) -> int:
    """Undo `build_commit_path`."""
    return int(path[len(COMMITS) + 1 : -len(".json")])


def build_quarantine_path(unit: int) -> str:
    return f"{QUARANTINE}/{unit:07d}.json"


def count_dead_letters(dead_letters: Iterable[DeadLetter]) -> tuple[dict[str, int], tuple[DeadLetter, ...]]:
    """Counts by reason over all dead letters, and the first of them for the commit's list."""
    letters = list(dead_letters)
    counts = Counter(letter.reason for letter in letters)
    return dict(sorted(counts.items())), tuple(letters[:LISTED_DEAD_LETTERS])


def commit_unit(files: StoreFiles, commit: Commit) -> Outcome:
    """Commit an attempt whose shard is already stored; of several attempts at a unit the first one wins.

    Raises:
        OutsideError: the storage kept contradicting itself; nothing of ours is committed as far as one can read.
        CorruptShardError, IncompatibleStoreError: another commit of the unit is there and cannot be read.
    """
    path = build_commit_path(commit.unit)

    def is_ours(found: bytes) -> bool:
        return parse_commit(found, f"{files.url}/{path}").attempt == commit.attempt

    won = create_or_read_back(files, path, serialize_commit(commit), is_ours)
    return Outcome.WON if won else Outcome.LOST


def serialize_commit(commit: Commit) -> bytes:
    """What is stored of a commit."""
    return seal(commit.model_dump_json().encode())


def parse_commit(data: bytes, where: str) -> Commit:
    """A commit from its bytes.

    Raises:
        CorruptShardError: the bytes are no commit record, or not as they were written.
        IncompatibleStoreError: a program with another format version wrote it.
    """
    try:
        commit = Commit.model_validate_json(unseal(data))
    except BrokenSealError as error:
        if isinstance(error, NotSealedError):  # another version may not know of seals
            _check_version(_read_version(data, where), where)
        raise CorruptShardError(f"{where}: expected a commit record, found {error}; {_VERIFY}") from None
    except ValidationError as error:
        _check_version(_read_version(data, where), where)
        first = error.errors()[0]["msg"]
        raise CorruptShardError(
            f"{where}: expected a commit record, found {error.error_count()} problem(s), first: {first}; {_VERIFY}"
        ) from None
    _check_version(commit.format_version, where)
    return commit


def _read_version(data: bytes, where: str) -> object:
    """What an object that is no commit record of this format version gives as its version."""
    try:
        values = json.loads(data)
    except ValueError as error:
        raise CorruptShardError(f"{where}: expected a commit record, found {error}; {_VERIFY}") from None
    return values.get("format_version") if isinstance(values, dict) else None


def _check_version(version: object, where: str) -> None:
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise IncompatibleStoreError(
            f"{where}: format version differs\n  in the commit: {version}\n  this program reads: {FORMAT_VERSION}\n"
            "install a logitstore that reads that version"
        )


def read_commit(files: StoreFiles, unit: int) -> Commit:
    """The commit of a unit.

    Raises:
        FileNotFoundError: the unit is not committed.
        CorruptShardError: the record is damaged.
    """
    path = build_commit_path(unit)
    return parse_commit(files.read(path), f"{files.url}/{path}")


def read_commits(files: StoreFiles, units: np.ndarray, plan_fingerprint: str) -> Iterator[Commit]:
    """The commits of these units, in the order asked for; those that were deleted meanwhile are left out.

    Raises:
        CorruptShardError, IncompatibleStoreError: a commit is damaged, or belongs to another unit, plan or format
            version.
    """
    for path, data in read_commit_files(files, units):
        where = f"{files.url}/{path}"
        try:
            commit = parse_commit(data, where)
        except CorruptShardError:  # once more: bytes can be damaged on the way, too
            commit = parse_commit(files.read(path), where)
        if commit.plan_fingerprint != plan_fingerprint:
            raise IncompatibleStoreError(
                f"{where}: belongs to another plan\n"
                f"  in the commit: {commit.plan_fingerprint}\n  in plan.json:  {plan_fingerprint}"
            )
        if build_commit_path(commit.unit) != path:
            raise CorruptShardError(f"{where}: expected its unit's commit, found that of unit {commit.unit}; {_VERIFY}")
        yield commit


def read_commit_files(files: StoreFiles, units: np.ndarray) -> Iterator[tuple[str, bytes]]:
    """Path and bytes of the commits of these units, in the order asked for; what was deleted meanwhile is left out."""
    for start in range(0, len(units), _PATHS_AT_A_TIME):
        yield from files.read_existing([build_commit_path(unit) for unit in units[start : start + _PATHS_AT_A_TIME]])


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitListing:
    """The units that have an object in a folder, as columns.

    Attributes:
        units: [U] int64, ascending.
        modified: [U] float64, seconds since the epoch; 0 where the file system does not tell.
        bytes: [U] int64, the sizes of the objects.
    """

    units: np.ndarray
    modified: np.ndarray
    bytes: np.ndarray


def list_unit_files(files: StoreFiles, folder: str) -> UnitListing:
    """What there is in `commits` or `quarantine`; one listing, nothing is read."""
    found = [
        (int(m[1]), file.modified or 0.0, file.bytes)
        for file in files.list(folder)
        if (m := _UNIT_NAME.fullmatch(file.name))
    ]
    columns = np.array(found, dtype=[("unit", np.int64), ("modified", np.float64), ("bytes", np.int64)])
    columns.sort(order="unit")
    return UnitListing(units=columns["unit"].copy(), modified=columns["modified"].copy(), bytes=columns["bytes"].copy())


def list_units(files: StoreFiles, folder: str) -> list[int]:
    """Units that have an object in `commits` or `quarantine`, ascending; one listing, nothing is read."""
    units: list[int] = list_unit_files(files, folder).units.tolist()
    return units


def quarantine_unit(files: StoreFiles, entry: QuarantinedUnit) -> None:
    """Set a unit aside; an entry that is there already stays.

    Raises:
        OutsideError: the storage failed; nothing is set aside as far as one can read.
    """
    create_or_read_back(files, build_quarantine_path(entry.unit), seal(entry.model_dump_json().encode()))


def read_quarantine(files: StoreFiles) -> list[QuarantinedUnit]:
    """All units set aside, ascending.

    Raises:
        CorruptShardError: a record is damaged.
    """
    paths = [build_quarantine_path(unit) for unit in list_units(files, QUARANTINE)]
    return [_parse_quarantined_unit(data, f"{files.url}/{path}") for path, data in files.read_existing(paths)]


def read_quarantined_unit(files: StoreFiles, unit: int) -> QuarantinedUnit:
    """The record of one unit that was set aside.

    Raises:
        FileNotFoundError: it is not set aside.
        CorruptShardError: the record is damaged.
    """
    path = build_quarantine_path(unit)
    return _parse_quarantined_unit(files.read(path), f"{files.url}/{path}")


def _parse_quarantined_unit(data: bytes, where: str) -> QuarantinedUnit:
    try:
        return QuarantinedUnit.model_validate_json(unseal(data))
    except (BrokenSealError, ValidationError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise CorruptShardError(
            f"{where}: expected a quarantine record, found {what}; delete it to try the unit again"
        ) from None
