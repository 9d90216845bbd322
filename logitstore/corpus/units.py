"""Work units of a corpus: which part of which file belongs to which unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from logitstore.corpus.files import CorpusFile
from logitstore.errors import ConfigError, IncompatibleStoreError

# How an open end is held in an integer column: larger than any offset, as infinity is.
_OPEN_STOP = np.iinfo(np.int64).max
_COLUMNS = ("span_unit", "span_file", "span_start", "span_stop")


@dataclass(frozen=True, slots=True)
class UnitSpan:
    """Part of a file that belongs to a unit; start and stop as `read_documents` takes them."""

    file_index: int
    start: int
    stop: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitTable:
    """Every span of every unit as columns, in corpus order.

    Attributes:
        span_unit: [S] int64, does not fall, leaves out no unit.
        span_file: [S] int64, index in the list of corpus files.
        span_start, span_stop: [S] int64; the largest int64 stands for an open end.
    """

    span_unit: np.ndarray
    span_file: np.ndarray
    span_start: np.ndarray
    span_stop: np.ndarray

    def __len__(self) -> int:
        return int(self.span_unit[-1]) + 1 if len(self.span_unit) else 0

    def spans(self, unit: int) -> list[UnitSpan]:
        """Spans of one unit, in corpus order.

        Raises:
            IndexError: there is no such unit.
        """
        first, last = self._span_range(unit)
        return [
            UnitSpan(file_index, start, None if stop == _OPEN_STOP else stop)
            for file_index, start, stop in zip(
                *(getattr(self, column)[first:last].tolist() for column in _COLUMNS[1:]), strict=True
            )
        ]

    def source_of(self, unit: int, files: Sequence[CorpusFile]) -> str:
        """Name of the source that a unit's documents come from."""
        return files[int(self.span_file[self._span_range(unit)[0]])].source

    def _span_range(self, unit: int) -> tuple[int, int]:
        if not 0 <= unit < len(self):
            raise IndexError(f"unit {unit} of a plan of {len(self)} units")
        first, last = np.searchsorted(self.span_unit, [unit, unit + 1])
        return int(first), int(last)

    def to_json(self) -> dict[str, list[int | None]]:
        """The columns as plain lists, an open end as None."""
        columns: dict[str, list[int | None]] = {name: getattr(self, name).tolist() for name in _COLUMNS}
        for i in np.flatnonzero(self.span_stop == _OPEN_STOP).tolist():
            columns["span_stop"][i] = None
        return columns

    @classmethod
    def from_json(cls, columns: Mapping[str, Sequence[int | None]]) -> UnitTable:
        """Undo `to_json`.

        Raises:
            IncompatibleStoreError: the columns are not those of a unit table.
        """
        if set(columns) != set(_COLUMNS) or len({len(values) for values in columns.values()}) != 1:
            raise IncompatibleStoreError(
                f"unit table: expected equally long columns {list(_COLUMNS)}, found "
                f"{ {name: len(values) for name, values in columns.items()} }; the plan was written by something else"
            )
        stops = [_OPEN_STOP if stop is None else stop for stop in columns["span_stop"]]
        table = _build_table(columns["span_unit"], columns["span_file"], columns["span_start"], stops)
        steps = np.diff(table.span_unit, prepend=-1)
        if len(steps) and (steps[0] != 1 or steps.min() < 0 or steps.max() > 1):
            raise IncompatibleStoreError(
                "unit table: expected units numbered from 0 without a gap; the plan is damaged"
            )
        return table


def count_units(columns: Mapping[str, Sequence[int | None]]) -> int:
    """How many units the columns of a stored table hold."""
    last = columns["span_unit"][-1] if columns.get("span_unit") else None
    return 0 if last is None else last + 1


def join_unit_tables(tables: Sequence[UnitTable], first_files: Sequence[int]) -> UnitTable:
    """One table of the units of several, numbered on from table to table.

    Args:
        tables: in order.
        first_files: where in the joint list of corpus files those of each table begin.
    """
    first_unit = 0
    parts = []
    for table, first_file in zip(tables, first_files, strict=True):
        parts.append((table.span_unit + first_unit, table.span_file + first_file, table.span_start, table.span_stop))
        first_unit += len(table)
    return _build_table(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def plan_units(
    files: Sequence[CorpusFile],
    unit_bytes: int,
    *,
    row_group_bytes_of: Callable[[int], Sequence[int]],
    decompressed_bytes_of: Callable[[int], int],
) -> UnitTable:
    """Cut a corpus into units of about `unit_bytes` of text.

    A unit is a run of the corpus, in order, within one source. Lines of JSON are cut at byte offsets, Parquet files
    between row groups, text files never. A piece joins a unit where that brings the unit nearer to `unit_bytes`, and no
    cut leaves half a unit or less of its file behind. Files added at the end of the corpus change no unit but the last.

    Args:
        files: the corpus, in order.
        unit_bytes: text per unit, decompressed.
        row_group_bytes_of: bytes of text in each row group of `files[i]`; asked for Parquet files only.
        decompressed_bytes_of: size of `files[i]` decompressed, may be estimated; asked for compressed files only.
    Raises:
        ConfigError: `unit_bytes` is less than 1.
    """
    if unit_bytes < 1:
        raise ConfigError(f"unit_bytes: expected at least 1, found {unit_bytes}")
    planner = _Planner(unit_bytes)
    source: str | None = None
    for file_index, file in enumerate(files):
        if file.source != source:
            planner.close_unit()
            source = file.source
        if file.bytes == 0:
            continue
        if file.format == "parquet":
            for group, num_bytes in enumerate(row_group_bytes_of(file_index)):
                planner.add_whole(file_index, group, group + 1, num_bytes)
            continue
        is_plain = file.compression == "none"
        num_bytes = file.bytes if is_plain else decompressed_bytes_of(file_index)
        stop = file.bytes if is_plain else _OPEN_STOP
        if file.format == "jsonl":
            planner.add_cut(file_index, num_bytes, stop)
        else:
            planner.add_whole(file_index, 0, stop, num_bytes)
    return planner.build()


class _Planner:
    """Fills units, one after the other."""

    def __init__(self, unit_bytes: int) -> None:
        self._unit_bytes = unit_bytes
        self._unit = 0
        self._filled = 0
        self._is_open = False  # whether the current unit has a span
        self._parts: list[tuple[np.ndarray, ...]] = []
        self._whole: tuple[list[int], ...] = ([], [], [], [])

    def close_unit(self) -> None:
        """End the current unit, where it has begun."""
        self._unit += self._is_open
        self._filled = 0
        self._is_open = False

    def add_whole(self, file_index: int, start: int, stop: int, num_bytes: int) -> None:
        """Add a piece that cannot be cut."""
        if 2 * self._filled + num_bytes > 2 * self._unit_bytes:
            self.close_unit()
        self._append(file_index, start, stop)
        self._fill(num_bytes)

    def add_cut(self, file_index: int, num_bytes: int, stop: int) -> None:
        """Add a piece that can be cut anywhere: the first part fills the current unit, others make units."""
        first_cut = self._unit_bytes - self._filled
        cuts = np.arange(first_cut, num_bytes - self._unit_bytes // 2, self._unit_bytes, dtype=np.int64)
        if not len(cuts):
            self._append(file_index, 0, stop)
            self._fill(num_bytes)
            return
        starts = np.concatenate([[0], cuts]).astype(np.int64)
        stops = np.concatenate([cuts, [stop]]).astype(np.int64)
        self._flush()
        units = self._unit + np.arange(len(starts), dtype=np.int64)
        self._parts.append((units, np.full(len(starts), file_index, dtype=np.int64), starts, stops))
        self._unit += len(cuts)
        self._filled = 0
        self._fill(num_bytes - int(cuts[-1]))

    def build(self) -> UnitTable:
        self._flush()
        columns = [np.concatenate(parts) for parts in zip(*self._parts, strict=True)] or [np.zeros(0, np.int64)] * 4
        return _build_table(*columns)

    def _append(self, file_index: int, start: int, stop: int) -> None:
        units, files, starts, stops = self._whole
        if units and (units[-1], files[-1], stops[-1]) == (self._unit, file_index, start):
            stops[-1] = stop  # the next row group of the same file
            return
        units.append(self._unit)
        files.append(file_index)
        starts.append(start)
        stops.append(stop)

    def _fill(self, num_bytes: int) -> None:
        self._is_open = True
        self._filled += num_bytes
        if self._filled >= self._unit_bytes:
            self.close_unit()

    def _flush(self) -> None:
        if self._whole[0]:
            self._parts.append(tuple(np.array(column, dtype=np.int64) for column in self._whole))
            self._whole = ([], [], [], [])


def _build_table(*columns: object) -> UnitTable:
    arrays = (np.asarray(column, dtype=np.int64) for column in columns)
    return UnitTable(**dict(zip(_COLUMNS, arrays, strict=True)))
