"""LogitStore: a store opened for reading, at one manifest."""

from __future__ import annotations

import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from logitstore.errors import CorruptShardError, IncompatibleStoreError, StoreNotFoundError
from logitstore.records import Record, RecordAddress, RecordBatch
from logitstore.shard.layout import DOCUMENT_COLUMNS, SIGNAL_COLUMNS
from logitstore.shard.layout import SCHEMA as SHARD_SCHEMA
from logitstore.shard.reader import check_digest, decode_row_group, read_footer
from logitstore.store.files import StoreFiles
from logitstore.store.manifest import Manifest, list_manifests, read_manifest, take_snapshot
from logitstore.store.plan import StorePlan, read_plan

# Parsed footers kept open: about 50 KB each.
_FOOTERS_KEPT = 512


@dataclass(frozen=True, kw_only=True)
class StoreStatistics:
    """Sums over a manifest; `bytes` are those of the shards, everything in them included. Entropies in nats."""

    records: int
    positions: int
    taught_positions: int
    support_entries: int
    bytes: int
    column_bytes: dict[str, int]
    documents: int
    recorded_documents: int
    dead_letters: dict[str, int]
    mean_entropy: float
    mean_tail_mass: float
    teacher_loss: float
    impossible_tokens: int
    entropy_histogram: tuple[int, ...]
    tail_histogram: tuple[int, ...]

    @property
    def bytes_per_position(self) -> float:
        return self.bytes / max(1, self.positions)


class LogitStore:
    """The records of a store at one manifest: a sequence, `store[i]` and `len(store)`, that reads what it is asked for.

    Safe to use from several threads. Pickles to its address and manifest number. Needs no torch.
    """

    def __init__(self, files: StoreFiles, plan: StorePlan, manifest: Manifest) -> None:
        self._files, self.plan, self.manifest = files, plan, manifest
        rows = manifest.row_groups
        self._paths: list[str] = rows["file"].to_pylist()
        self._digests: list[str] = rows["sha256"].to_pylist()
        self._footer_digests: list[str] = rows["footer_sha256"].to_pylist()
        self._offsets = rows["offset"].to_numpy()
        self._bytes = rows["bytes"].to_numpy()
        self._footer_offsets = rows["footer_offset"].to_numpy()
        self._file_bytes = rows["file_bytes"].to_numpy()
        self._row_group_in_file = rows["row_group"].to_numpy()
        self.row_group_units: np.ndarray = rows["unit"].to_numpy()
        self.row_group_records: np.ndarray = rows["records"].to_numpy()
        self._first_records = np.concatenate([[0], np.cumsum(self.row_group_records)])
        self._footers: OrderedDict[str, pq.FileMetaData] = OrderedDict()
        self._lock = threading.Lock()
        self._last: tuple[int, RecordBatch] | None = None

    @classmethod
    def open(
        cls,
        url: str,
        manifest: int | Literal["latest", "live"] = "latest",
        storage_options: dict[str, Any] | None = None,
    ) -> LogitStore:
        """Open a store.

        Args:
            url: any fsspec URL or local path.
            manifest: a number pins the store for ever; "latest" is the newest stored one; "live" takes a snapshot of
                what is committed at this moment, also while a capture runs.
            storage_options: passed to fsspec.
        Raises:
            StoreNotFoundError: no store, or no such manifest.
            IncompatibleStoreError: another format version, or a manifest of another plan.
        """
        files = StoreFiles(url, storage_options)
        plan = read_plan(files)
        fingerprint = plan.compute_fingerprint()
        if manifest == "live":
            numbers = list_manifests(files)
            snapshot = take_snapshot(files, fingerprint, read_manifest(files, numbers[-1]) if numbers else None)
        else:
            snapshot = read_manifest(files, None if manifest == "latest" else manifest)
        if snapshot.plan_fingerprint != fingerprint:
            raise IncompatibleStoreError(
                f"{url}: manifest and plan do not belong together\n  plan of the manifest: "
                f"{snapshot.plan_fingerprint}\n  plan.json:            {fingerprint}\nrun 'logitstore verify {url}'"
            )
        return cls(files, plan, snapshot)

    def __reduce__(self) -> tuple[Any, ...]:
        manifest: int | str = "live" if self.manifest.number is None else self.manifest.number
        return LogitStore.open, (self._files.url, manifest, self._files.storage_options)

    @property
    def url(self) -> str:
        return self._files.url

    @property
    def manifest_number(self) -> int | None:
        """Number of the manifest, None for a live snapshot."""
        return self.manifest.number

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the records are; equal for two manifests that list the same bytes."""
        return self.manifest.fingerprint

    @property
    def num_row_groups(self) -> int:
        return len(self._paths)

    def __len__(self) -> int:
        return int(self._first_records[-1])

    def __getitem__(self, i: int) -> Record:
        """Record `i` in address order, with its documents; negative counts from the end."""
        index = i + len(self) if i < 0 else i
        if not 0 <= index < len(self):
            raise IndexError(f"record {i} of a store of {len(self)} records")
        row_group = int(np.searchsorted(self._first_records, index, side="right")) - 1
        last = self._last
        if last is None or last[0] != row_group:
            last = row_group, self.read_row_group(row_group, with_documents=True)
            self._last = last
        return last[1].record(index - int(self._first_records[row_group]))

    def __iter__(self) -> Iterator[Record]:
        for row_group in range(self.num_row_groups):
            yield from self.read_row_group(row_group, with_documents=True)

    def find(self, address: RecordAddress) -> Record:
        """The record at an address.

        Raises:
            StoreNotFoundError: the unit is not committed, or has fewer records.
        """
        first = int(np.searchsorted(self.row_group_units, address.unit))
        last = int(np.searchsorted(self.row_group_units, address.unit, side="right"))
        position = int(self._first_records[first]) + address.index
        if address.index < 0 or position >= int(self._first_records[last]):
            held = int(self._first_records[last] - self._first_records[first])
            raise StoreNotFoundError(f"{self.url}: no record {address}: unit {address.unit} holds {held} records")
        return self[position]

    def read_row_group(self, row_group: int, *, with_documents: bool = False) -> RecordBatch:
        """Read, verify and decode one row group (0-based in the manifest).

        Bytes that do not match their digest are fetched once more before that is an error.

        Raises:
            CorruptShardError: names the file and the row group.
            OutsideError: the storage failed.
        """
        where = f"{self.url}/{self._paths[row_group]}: row group {int(self._row_group_in_file[row_group])}"
        data = self.read_row_group_bytes(row_group)
        metadata = self._get_footer(row_group)
        columns = SIGNAL_COLUMNS + DOCUMENT_COLUMNS if with_documents else SIGNAL_COLUMNS
        return decode_row_group(
            metadata, int(self._row_group_in_file[row_group]), int(self._offsets[row_group]), data, columns, where
        )

    def read_row_group_bytes(self, row_group: int) -> bytes:
        """The verified bytes of one row group's pages."""
        start = int(self._offsets[row_group])
        return self._read_verified(
            row_group,
            start,
            start + int(self._bytes[row_group]),
            self._digests[row_group],
            f"row group {int(self._row_group_in_file[row_group])}",
        )

    def _read_verified(self, row_group: int, start: int, stop: int, sha256: str, part: str) -> bytes:
        path = self._paths[row_group]
        unit = int(self.row_group_units[row_group])
        what_to_do = f"run 'logitstore verify {self.url}' and capture unit {unit} again"
        where = f"{self.url}/{path}: {part}"
        for attempt in range(2):
            try:
                data = self._files.read(path, start, stop)
            except FileNotFoundError:
                raise CorruptShardError(f"{where}: the file is gone; {what_to_do}") from None
            try:
                check_digest(data, stop - start, sha256, where=where, what_to_do=what_to_do)
            except CorruptShardError:
                if attempt == 1:
                    raise
                continue
            return data
        raise AssertionError("unreachable")

    def _get_footer(self, row_group: int) -> pq.FileMetaData:
        path = self._paths[row_group]
        with self._lock:
            if path in self._footers:
                self._footers.move_to_end(path)
                return self._footers[path]
        start, stop = int(self._footer_offsets[row_group]), int(self._file_bytes[row_group])
        data = self._read_verified(row_group, start, stop, self._footer_digests[row_group], "footer")
        metadata, header = read_footer(data, f"{self.url}/{path}")
        if header.plan_fingerprint != self.manifest.plan_fingerprint:
            raise IncompatibleStoreError(
                f"{self.url}/{path}: shard of another plan\n  in the shard: {header.plan_fingerprint}\n"
                f"  in the manifest: {self.manifest.plan_fingerprint}"
            )
        with self._lock:
            self._footers[path] = metadata
            while len(self._footers) > _FOOTERS_KEPT:
                self._footers.popitem(last=False)
        return metadata

    def compute_statistics(self, source: str | None = None) -> StoreStatistics:
        """Sums over the whole manifest, or over the units of one source; reads nothing."""
        table, units = self.manifest.table, self.manifest.per_unit
        if source is not None:
            table = table.filter(pc.equal(table["source"], source))
            units = units.filter(pc.equal(units["source"], source))
        positions = _sum(table, "positions")
        impossible = _sum(table, "impossible_tokens")
        dead_letters: Counter[str] = Counter()
        for counts in units["dead_letter_counts"].to_pylist():
            dead_letters.update(json.loads(counts))
        return StoreStatistics(
            records=_sum(table, "records"),
            positions=positions,
            taught_positions=_sum(table, "taught_positions"),
            support_entries=_sum(table, "support_entries"),
            bytes=_sum(units, "file_bytes"),
            column_bytes={name: _sum(table, f"{name}_bytes") for name in SHARD_SCHEMA.names},
            documents=_sum(units, "documents"),
            recorded_documents=_sum(units, "recorded_documents"),
            dead_letters=dict(sorted(dead_letters.items())),
            mean_entropy=_sum_float(table, "entropy_sum") / max(1, positions),
            mean_tail_mass=_sum_float(table, "tail_mass_sum") / max(1, positions),
            teacher_loss=-_sum_float(table, "next_token_logprob_sum") / max(1, positions - impossible),
            impossible_tokens=impossible,
            entropy_histogram=_sum_lists(table, "entropy_histogram"),
            tail_histogram=_sum_lists(table, "tail_histogram"),
        )

    def list_sources(self) -> list[str]:
        """Names of the corpus sources that have committed units, in order."""
        return sorted(set(self.manifest.per_unit["source"].to_pylist()))


def _sum(table: Any, name: str) -> int:
    return int(pc.sum(table[name]).as_py() or 0)


def _sum_float(table: Any, name: str) -> float:
    return float(pc.sum(table[name]).as_py() or 0.0)


def _sum_lists(table: Any, name: str) -> tuple[int, ...]:
    lists = [values for values in table[name].to_pylist() if values]
    return tuple(np.sum(lists, axis=0).tolist()) if lists else ()
