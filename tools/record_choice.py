"""Which record, and which of its positions, a command line names."""

from __future__ import annotations

from logitstore.errors import ConfigError, StoreNotFoundError
from logitstore.records import Record, RecordAddress
from logitstore.store.logit_store import LogitStore

FIRST_POSITIONS = 32


def find_record(store: LogitStore, record: str) -> Record:
    """The record that `N` or `UNIT/INDEX` names.

    Raises:
        ConfigError: it is neither.
        StoreNotFoundError: there is no such record.
    """
    unit, slash, index = record.partition("/")
    try:
        numbers = [int(unit), int(index)] if slash else [int(record)]
    except ValueError:
        raise ConfigError(f"--record {record!r}: expected N or UNIT/INDEX, such as 12 or 3/17") from None
    if slash:
        return store.find(RecordAddress(unit=numbers[0], index=numbers[1]))
    if not -len(store) <= numbers[0] < len(store):
        raise StoreNotFoundError(f"{store.url}: no record {record}: the store holds {len(store):,} records, from 0")
    return store[numbers[0]]


def parse_positions(text: str | None, num_positions: int, *, is_search: bool = False) -> range:
    """The positions that `START:STOP` names in a record, as far as it has them; without, the first, or all to search.

    Raises:
        ConfigError: the text is no range, or names no position of the record.
    """
    if text is None:
        return range(num_positions if is_search else min(num_positions, FIRST_POSITIONS))
    start, colon, stop = text.partition(":")
    try:
        first = int(start or 0)
        last = (int(stop) if stop else num_positions) if colon else first + 1
    except ValueError:
        raise ConfigError(f"--positions {text!r}: expected START:STOP, such as 100:140") from None
    chosen = range(first, min(last, num_positions))
    if first < 0 or not chosen:
        raise ConfigError(f"--positions {text!r}: expected positions from 0 to {num_positions}, found none of them")
    return chosen
