"""Commit records: the one act that makes a captured unit part of the store, exactly once.

A shard is uploaded under a name of its own (unit and attempt) and means nothing until `commits/<unit>.json` names it.
That object is create-only, so of several attempts the first one wins and the others are garbage. A kill before the
commit leaves garbage; a kill after it leaves a finished unit.
"""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Iterable
from enum import StrEnum

from pydantic import ValidationError

from logitstore.corpus.documents import DeadLetter
from logitstore.errors import CorruptShardError, OutsideError
from logitstore.settings import Settings
from logitstore.shard.layout import FORMAT_VERSION
from logitstore.shard.summary import ShardSummary
from logitstore.store.files import StoreFiles

COMMITS = "commits"
DATA = "data"
QUARANTINE = "quarantine"
# Dead letters listed one by one in a commit; the counts always hold all of them.
LISTED_DEAD_LETTERS = 1000
_TRIES = 5


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


def build_quarantine_path(unit: int) -> str:
    return f"{QUARANTINE}/{unit:07d}.json"


def count_dead_letters(dead_letters: Iterable[DeadLetter]) -> tuple[dict[str, int], tuple[DeadLetter, ...]]:
    """Counts by reason over all dead letters, and the first of them for the commit's list."""
    letters = list(dead_letters)
    counts = Counter(letter.reason for letter in letters)
    return dict(sorted(counts.items())), tuple(letters[:LISTED_DEAD_LETTERS])


def commit_unit(files: StoreFiles, commit: Commit) -> Outcome:
    """Commit an attempt whose shard is already stored.

    "Something is there" and "the request failed" are both ambiguous after a lost response, so every doubt is settled
    by reading back: our attempt in the record means won, another means lost, no record means try again.

    Raises:
        OutsideError: the storage kept contradicting itself; nothing of ours is committed as far as one can read.
    """
    path = build_commit_path(commit.unit)
    data = commit.model_dump_json().encode()
    trouble: OutsideError | None = None
    for _ in range(_TRIES):
        try:
            if files.create(path, data):
                return Outcome.WON
        except OutsideError as error:
            trouble = error
        try:
            winner = read_commit(files, commit.unit)
        except FileNotFoundError:
            continue
        except OutsideError as error:
            trouble = error
            continue
        return Outcome.WON if winner.attempt == commit.attempt else Outcome.LOST
    raise trouble or OutsideError(f"{files.url}/{path}: neither created nor found after {_TRIES} tries; run it again")


def parse_commit(data: bytes, where: str) -> Commit:
    """A commit from its bytes.

    Raises:
        CorruptShardError: the bytes are no commit record.
    """
    try:
        return Commit.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]["msg"]
        raise CorruptShardError(
            f"{where}: expected a commit record, found {error.error_count()} problem(s), first: {first}; "
            "run 'logitstore verify'"
        ) from None


def read_commit(files: StoreFiles, unit: int) -> Commit:
    """The commit of a unit.

    Raises:
        FileNotFoundError: the unit is not committed.
        CorruptShardError: the record is damaged.
    """
    path = build_commit_path(unit)
    return parse_commit(files.read(path), f"{files.url}/{path}")


def list_units(files: StoreFiles, folder: str) -> list[int]:
    """Units that have an object in `commits` or `quarantine`, ascending; one listing, nothing is read."""
    matches = (re.fullmatch(r"(\d{7,})\.json", file.name) for file in files.list(folder))
    return sorted(int(match[1]) for match in matches if match)


def quarantine_unit(files: StoreFiles, entry: QuarantinedUnit) -> None:
    """Set a unit aside; an entry that is there already stays."""
    files.create(build_quarantine_path(entry.unit), entry.model_dump_json().encode())


def read_quarantine(files: StoreFiles) -> list[QuarantinedUnit]:
    """All units set aside, ascending.

    Raises:
        CorruptShardError: a record is damaged.
    """
    paths = [build_quarantine_path(unit) for unit in list_units(files, QUARANTINE)]
    entries = []
    for path, data in zip(paths, files.read_many(paths), strict=True):
        try:
            entries.append(QuarantinedUnit.model_validate_json(data))
        except ValidationError as error:
            raise CorruptShardError(
                f"{files.url}/{path}: expected a quarantine record, found {error.errors()[0]['msg']}; delete it to try "
                "the unit again"
            ) from None
    return entries
