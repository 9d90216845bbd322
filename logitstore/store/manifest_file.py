"""The Parquet form of a manifest: written while its rows come, read column by column.

A store of a million shards has millions of rows at 330 bytes each in memory, 130 as Parquet. So a manifest is held as
Parquet bytes, and whoever wants some of its columns has those decoded.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitstore.errors import CorruptShardError, IncompatibleStoreError
from logitstore.shard.layout import FORMAT_VERSION
from logitstore.store.manifest_table import SCHEMA

_METADATA_KEY = b"logitstore_manifest"
_NO_DIGEST = b"0" * 64
# More than any footer takes: its key-value metadata stands at its end.
_FOOTER_BYTES = 1 << 20
# Rows decoded at a time by those who go through a manifest: about 40 MB with all columns.
_ROWS_AT_A_TIME = 131_072
# Columns whose values repeat; a dictionary of the others is work for nothing.
_REPEATING = ["source", "dead_letter_counts", "records", "positions", "taught_positions", "support_entries"]


class ManifestFile:
    """A manifest as Parquet bytes in memory. Safe to use from several threads.

    Args:
        data: the bytes.
        where: what to call it in errors.
    Raises:
        CorruptShardError: this is no manifest.
        IncompatibleStoreError: a program with another format version wrote it.
    """

    def __init__(self, data: bytes, where: str) -> None:
        self.data = data
        self._where = where
        with self._explain():
            parquet = self._open()
            header = json.loads(parquet.metadata.metadata[_METADATA_KEY])
            version, self.plan_fingerprint = header["format_version"], str(header["plan_fingerprint"])
            if "sha256" in header or version == FORMAT_VERSION:
                _check_digest(data, header["sha256"])
        if version != FORMAT_VERSION:
            raise IncompatibleStoreError(
                f"{where}: format version differs\n  in the manifest: {version}\n"
                f"  this program reads: {FORMAT_VERSION}\ninstall a logitstore that reads that version"
            )
        if not parquet.schema_arrow.remove_metadata().equals(SCHEMA):
            raise CorruptShardError(
                f"{where}: expected the columns of a manifest, found others; run 'logitstore verify --repair'"
            )

    @property
    def num_rows(self) -> int:
        return int(self._open().metadata.num_rows)

    def read(self, names: Sequence[str] = SCHEMA.names) -> pa.Table:
        """All rows of some columns; those of strings that repeat come as dictionaries.

        Raises:
            CorruptShardError: the bytes are damaged.
        """
        with self._explain():
            return self._open().read(list(names), use_threads=False)

    def iterate(self, names: Sequence[str] = SCHEMA.names) -> Iterator[pa.Table]:
        """Some columns, some rows at a time, in order; see `read`."""
        parquet = self._open()
        for row_group in range(parquet.num_row_groups):
            with self._explain():
                table = parquet.read_row_group(row_group, list(names), use_threads=False)
            yield table

    def check(self) -> None:
        """Decode everything once.

        Raises:
            CorruptShardError: the bytes are damaged.
        """
        for _ in self.iterate():
            pass

    def _open(self) -> pq.ParquetFile:
        # Read without Arrow's threads (`use_threads=False` below): a thread lets go of these bytes, which are Python's,
        # when it likes, and one that does so while the interpreter shuts down ends the process with SIGABRT.
        return pq.ParquetFile(pa.BufferReader(self.data), page_checksum_verification=True, pre_buffer=False)

    @contextlib.contextmanager
    def _explain(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise CorruptShardError(
                f"{self._where}: expected a manifest, found {error}; run 'logitstore verify --repair'"
            ) from error


def write_manifest_file(tables: Iterable[pa.Table], plan_fingerprint: str, where: str) -> ManifestFile:
    """Ordered rows as Parquet, the same bytes for the same rows however they are cut into tables."""
    header = {"format_version": FORMAT_VERSION, "plan_fingerprint": plan_fingerprint, "sha256": _NO_DIGEST.decode()}
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink, SCHEMA, compression="zstd", write_page_checksum=True, use_dictionary=_REPEATING
    ) as writer:
        for table in _cut(tables):
            writer.write_table(table.replace_schema_metadata(None), row_group_size=_ROWS_AT_A_TIME)
        writer.add_key_value_metadata({_METADATA_KEY: json.dumps(header).encode()})
    view = sink.getbuffer()
    place = _find_digest(view, _NO_DIGEST)
    view[place : place + len(_NO_DIGEST)] = hashlib.sha256(view).hexdigest().encode()
    view.release()
    return ManifestFile(sink.getvalue(), where)


def _check_digest(data: bytes, digest: str) -> None:
    """Hold a manifest to the digest in its metadata: that of its bytes with 64 zeros in the digest's place.

    Raises:
        ValueError: they differ; Parquet's own checksums leave out footer and page headers.
    """
    place, view = _find_digest(data, digest.encode()), memoryview(data)
    found = hashlib.sha256(view[:place])
    found.update(_NO_DIGEST)
    found.update(view[place + len(_NO_DIGEST) :])
    if found.hexdigest() != digest:
        raise ValueError(f"bytes that are not the ones that were written: sha256 {found.hexdigest()}, not {digest}")


def _find_digest(data: bytes | memoryview, digest: bytes) -> int:
    """Where in the footer, which is the file's end, the digest stands."""
    start = max(0, len(data) - _FOOTER_BYTES)
    place = bytes(data[start:]).rfind(digest)
    if place < 0 or len(digest) != len(_NO_DIGEST):
        raise ValueError("a digest that is not in its place")
    return start + place


def _cut(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of equally many, but for the last one."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        while sum(map(len, waiting)) >= _ROWS_AT_A_TIME:
            joined = pa.concat_tables(waiting)
            yield joined.slice(0, _ROWS_AT_A_TIME)
            waiting = [joined.slice(_ROWS_AT_A_TIME)]
    if any(map(len, waiting)):
        yield pa.concat_tables(waiting)


def select_rows(table: pa.Table, is_wanted: np.ndarray) -> pa.Table:
    """Rows of a table by a mask; the table itself where all are wanted."""
    return table if is_wanted.all() else table.filter(pa.array(is_wanted))
