"""LogitStore: a store opened for reading, at one manifest."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow.parquet as pq

from logitstore.errors import (
    ConfigError,
    CorruptShardError,
    IncompatibleStoreError,
    OutsideError,
    StoreNotFoundError,
)
from logitstore.records import Record, RecordAddress, RecordBatch
from logitstore.shard.layout import ShardHeader
from logitstore.shard.packed import PackedRowGroup
from logitstore.shard.reader import check_digest, decode_row_group, pack_row_group, read_footer
from logitstore.shard.record_statistics import RecordStatistics, read_statistics
from logitstore.store.files import StoreFiles
from logitstore.store.manifest import Manifest, list_manifests, read_manifest, take_snapshot
from logitstore.store.plan import StorePlan, check_units_are_planned, read_plan
from logitstore.store.statistics import StoreStatistics, compute_statistics

__all__ = ["LogitStore", "StoreStatistics"]

_LOG = logging.getLogger(__name__)
# Footers kept, as bytes: a large shard's has 100 KB of them, which parse in half a millisecond to ten times as much.
_FOOTERS_KEPT = 512
# Of those that are kept parsed: some 10 MB.
_MOST_PARSED_BYTES = 1 << 20
# Before the second, third and fourth try of a read that failed: longer than the hiccups that clients do not ride out.
RETRY_WAITS_SECONDS = (1.0, 5.0, 20.0)


class BytesCache(Protocol):
    """What a store asks of a cache; `logitstore.stream.cache.RowGroupCache` is one."""

    def check_holds(self, num_bytes: int, what: str) -> None:
        """Raise a ConfigError where so many bytes cannot be kept."""

    def read(self, sha256: bytes, num_bytes: int, fetch: Callable[[], bytes]) -> bytes:
        """Bytes of a digest, from the cache or else from `fetch`, which has held them to it."""


class LogitStore:
    """The records of a store at one manifest: a sequence, `store[i]` and `len(store)`, that reads what it is asked for.

    Safe to use from several threads. Pickles to its address, manifest number and cache, so a live snapshot does not
    pickle. Needs no torch.

    Args:
        files: the store.
        plan: its plan.
        manifest: what to read of it.
        retry_waits_seconds: how long to wait before each further try of a read that failed with an OutsideError.
        cache: where row groups and footers are looked for first, and kept.
    Raises:
        ConfigError: the cache has no room for a row group.
    """

    def __init__(
        self,
        files: StoreFiles,
        plan: StorePlan,
        manifest: Manifest,
        retry_waits_seconds: Sequence[float] = RETRY_WAITS_SECONDS,
        cache: BytesCache | None = None,
    ) -> None:
        self._files, self.plan, self.manifest, self.cache = files, plan, manifest, cache
        self._retry_waits_seconds = tuple(retry_waits_seconds)
        self.process_id = os.getpid()  # clients of storages, and locks, do not outlive a fork
        rows = manifest.read_row_groups("unit", "row_group", "offset", "bytes", "records")
        # Columns stay in Arrow, or are views of it: a store may have millions of row groups.
        self._shards = manifest.read_units("unit", "file", "file_bytes", "footer_offset", "footer_sha256")
        self._digests = manifest.digests
        self._offsets = rows["offset"].to_numpy()
        self.row_group_bytes: np.ndarray = rows["bytes"].to_numpy()
        if cache is not None:
            cache.check_holds(int(self.row_group_bytes.max(initial=0)), f"the largest row group of {files.url}")
        self._row_group_in_file = rows["row_group"].to_numpy()
        self.row_group_units: np.ndarray = rows["unit"].to_numpy()
        self.row_group_records: np.ndarray = rows["records"].to_numpy()
        self._first_records = np.concatenate([[0], np.cumsum(self.row_group_records)])
        self._footers: OrderedDict[str, bytes] = OrderedDict()
        self._parsed_footers: dict[str, tuple[pq.FileMetaData, ShardHeader]] = {}
        self._parsed_bytes = 0
        self._lock, self._computing = threading.Lock(), threading.Lock()
        self._last: tuple[int, RecordBatch] | None = None

    @classmethod
    def open(
        cls,
        url: str,
        manifest: int | Literal["latest", "live"] = "latest",
        storage_options: dict[str, Any] | None = None,
        retry_waits_seconds: Sequence[float] = RETRY_WAITS_SECONDS,
        cache: BytesCache | None = None,
    ) -> LogitStore:
        """Open a store.

        Args:
            url: any fsspec URL or local path.
            manifest: a number pins the store for ever; "latest" is the newest stored one; "live" takes a snapshot of
                what is committed at this moment, also while a capture runs.
            storage_options: passed to fsspec.
            retry_waits_seconds: how long to wait before each further try of a read that failed.
            cache: a local one for what is read, such as `RowGroupCache(folder, max_bytes)`.
        Raises:
            StoreNotFoundError: no store, or no such manifest.
            ConfigError: the cache has no room for a row group.
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
        check_units_are_planned(files.url, plan, snapshot.units)
        return cls(files, plan, snapshot, retry_waits_seconds, cache)

    def __reduce__(self) -> tuple[Any, ...]:
        number = self.manifest.number
        if number is None:
            raise ConfigError(
                f"{self.url}: a live snapshot cannot be pickled: the process that opened it again would find other "
                "records; open a stored manifest, or open the live store there"
            )
        options, waits = self._files.storage_options, self._retry_waits_seconds
        return LogitStore.open, (self._files.url, number, options, waits, self.cache)

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
        return len(self._offsets)

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

        Bytes that do not match their digest are fetched once more before that is an error; a storage that fails is
        asked again after each of `retry_waits_seconds`.

        Raises:
            CorruptShardError: names the file and the row group.
            OutsideError: the storage failed.
        """
        batch: RecordBatch = self._read_row_group(decode_row_group, row_group, with_documents)
        return batch

    def read_packed_row_group(self, row_group: int, *, with_documents: bool = False) -> RecordBatch | PackedRowGroup:
        """The same, with supports that are decoded when they are wanted, where that is possible and saves time."""
        packed: RecordBatch | PackedRowGroup = self._read_row_group(pack_row_group, row_group, with_documents)
        return packed

    def _read_row_group(self, decode: Callable[..., Any], row_group: int, with_documents: bool) -> Any:
        data = self.read_row_group_bytes(row_group)
        metadata, header = self._get_footer(row_group)
        return decode(
            metadata,
            header,
            int(self._row_group_in_file[row_group]),
            int(self._offsets[row_group]),
            data,
            with_documents=with_documents,
            where=f"{self.url}/{self._get_path(row_group)}: row group {int(self._row_group_in_file[row_group])}",
            computing=self._computing,
        )

    def read_row_group_bytes(self, row_group: int) -> bytes:
        """The verified bytes of one row group's pages."""
        start = int(self._offsets[row_group])
        return self._read_verified(
            row_group,
            start,
            start + int(self.row_group_bytes[row_group]),
            self._digests[row_group].tobytes(),
            f"row group {int(self._row_group_in_file[row_group])}",
        )

    def read_record_statistics(self, unit: int) -> RecordStatistics:
        """What the records of a unit are chosen by, in order of their indices; one read, of its shard's footer.

        Raises:
            StoreNotFoundError: the unit is not committed, or has no records.
            IncompatibleStoreError: the shard was written before there were statistics.
            CorruptShardError, OutsideError: as in `read_row_group`.
        """
        first = int(np.searchsorted(self.row_group_units, unit))
        last = int(np.searchsorted(self.row_group_units, unit, side="right"))
        if first == last:
            raise StoreNotFoundError(f"{self.url}: no records of unit {unit}")
        num_records = int(self._first_records[last] - self._first_records[first])
        # Neither parsed nor kept: a store may have 100,000 footers, of a megabyte each when they are parsed.
        return read_statistics(self._read_footer_bytes(first), num_records, f"{self.url}/{self._get_path(first)}")

    def _get_unit_value(self, row_group: int, name: str) -> Any:
        """A column of the manifest that stands once per unit."""
        index = int(np.searchsorted(self.manifest.units, self.row_group_units[row_group]))
        return self._shards[name][index].as_py()

    def _get_path(self, row_group: int) -> str:
        return str(self._get_unit_value(row_group, "file"))

    def _read_verified(self, row_group: int, start: int, stop: int, sha256: bytes, part: str) -> bytes:
        fetch = partial(self._fetch_verified, row_group, start, stop, sha256, part)
        return fetch() if self.cache is None else self.cache.read(sha256, stop - start, fetch)

    def _fetch_verified(self, row_group: int, start: int, stop: int, sha256: bytes, part: str) -> bytes:
        path = self._get_path(row_group)
        unit = int(self.row_group_units[row_group])
        what_to_do = f"run 'logitstore verify {self.url}' and capture unit {unit} again"
        where = f"{self.url}/{path}: {part}"
        for attempt in range(2):
            try:
                data = self._read_patiently(path, start, stop)
            except FileNotFoundError:
                raise CorruptShardError(f"{where}: the file is gone; {what_to_do}") from None
            try:
                check_digest(data, stop - start, sha256.hex(), where=where, what_to_do=what_to_do)
            except CorruptShardError:
                if attempt == 1:
                    raise
                continue
            return data
        raise AssertionError("unreachable")

    def _read_patiently(self, path: str, start: int, stop: int) -> bytes:
        for seconds in self._retry_waits_seconds:
            try:
                return self._files.read(path, start, stop)
            except OutsideError as error:
                _LOG.warning("reading again in %g s: %s", seconds, error)
                time.sleep(seconds)
        return self._files.read(path, start, stop)

    def _get_footer(self, row_group: int) -> tuple[pq.FileMetaData, ShardHeader]:
        path = self._get_path(row_group)
        with self._lock:
            parsed = self._parsed_footers.get(path)
            footer = self._footers.get(path)
        if parsed is not None:
            return parsed
        if footer is None:
            footer = self._read_footer_bytes(row_group)
        metadata, header = read_footer(footer, f"{self.url}/{path}")
        if header.plan_fingerprint != self.manifest.plan_fingerprint:
            raise IncompatibleStoreError(
                f"{self.url}/{path}: shard of another plan\n  in the shard: {header.plan_fingerprint}\n"
                f"  in the manifest: {self.manifest.plan_fingerprint}"
            )
        with self._lock:
            self._footers[path] = footer
            self._footers.move_to_end(path)
            while len(self._footers) > _FOOTERS_KEPT:
                self._footers.popitem(last=False)
            # The first ones stay: a stream of more shards than these meets each too seldom to find it here.
            if self._parsed_bytes + len(footer) <= _MOST_PARSED_BYTES and path not in self._parsed_footers:
                self._parsed_footers[path] = metadata, header
                self._parsed_bytes += len(footer)
        return metadata, header

    def _read_footer_bytes(self, row_group: int) -> bytes:
        start, stop = (int(self._get_unit_value(row_group, name)) for name in ("footer_offset", "file_bytes"))
        return self._read_verified(row_group, start, stop, self._get_unit_value(row_group, "footer_sha256"), "footer")

    def compute_statistics(self, source: str | None = None) -> StoreStatistics:
        """Sums over the whole manifest, or over the units of one source; reads nothing."""
        return compute_statistics(self.manifest, source, self.plan.unknown_scalars)

    def list_sources(self) -> list[str]:
        """Names of the corpus sources that have committed units, in order."""
        return sorted(
            {name for units in self.manifest.iterate_units("source") for name in units["source"].unique().to_pylist()}
        )
