"""One record of a shard file, with its store or without."""

from __future__ import annotations

import numpy as np

from logitstore.errors import ConfigError, LogitStoreError, StoreNotFoundError
from logitstore.records import Record
from logitstore.shard.layout import ShardHeader
from logitstore.shard.reader import decode_row_group
from logitstore.store.files import StoreFiles
from logitstore.store.plan import StorePlan, read_plan
from tools.position_filter import PositionFilter
from tools.record_view import RecordView, build_record_view
from tools.shard_view import open_shard


def read_shard_record_view(
    url: str,
    record: str,
    positions: str | None = None,
    *,
    top: int = 5,
    tokenizer: str | None = None,
    only: PositionFilter | None = None,
) -> RecordView:
    """Read one record of a shard and put its signal into words; reads its row group only.

    No digest vouches for it: the checksums of its pages are looked at instead. Its teacher is told by the plan of the
    store that it lies in, where it lies in one.

    Args:
        url: of the shard.
        record: `N`, 0-based in the shard, or `UNIT/INDEX`.
        positions, top, tokenizer, only: as in `tools.record_view.read_record_view`.

    Raises:
        ConfigError: `record` or `positions` cannot be understood.
        StoreNotFoundError: there is no such shard or record.
        CorruptShardError, IncompatibleStoreError: it is no shard, or damaged.
    """
    found, header = _read_record(url, record)
    plan = _find_plan(url, header)
    return build_record_view(
        found,
        positions,
        url=url,
        source=None if plan is None else plan.build_unit_table().source_of(found.address.unit, plan.files),
        teacher=None if plan is None else plan.teacher,
        unknown=header.unknown_scalars,
        top=top,
        tokenizer=tokenizer,
        only=only,
    )


def _read_record(url: str, record: str) -> tuple[Record, ShardHeader]:
    shard = open_shard(url)
    metadata, header = shard.metadata, shard.header
    index = _parse_index(url, record, header.unit, metadata.num_rows)
    ends = np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])
    number = int(np.searchsorted(ends, index, side="right"))
    row_group = metadata.row_group(number)
    chunks = [row_group.column(i) for i in range(row_group.num_columns)]
    starts = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
    stop = max(start + chunk.total_compressed_size for start, chunk in zip(starts, chunks, strict=True))
    data = shard.files.read(shard.name, min(starts), stop)
    batch = decode_row_group(
        metadata, header, number, min(starts), data, with_documents=True, where=url, is_thorough=True
    )
    return batch.record(index - int(ends[number] - row_group.num_rows)), header


def _parse_index(url: str, record: str, unit: int, num_records: int) -> int:
    of_unit, slash, place = record.partition("/")
    try:
        found_unit, index = (int(of_unit), int(place)) if slash else (unit, int(record))
    except ValueError:
        raise ConfigError(f"--record {record!r}: expected N or UNIT/INDEX, such as 12 or {unit}/12") from None
    if found_unit != unit or not 0 <= index < num_records:
        raise StoreNotFoundError(f"{url}: no record {record}: the shard holds {unit}/0 to {unit}/{num_records - 1}")
    return index


def _find_plan(url: str, header: ShardHeader) -> StorePlan | None:
    """The plan of the store around a shard, where there is one and it is the shard's."""
    folder, _, _ = url.rpartition("/data/")
    if not folder:
        return None
    try:
        plan = read_plan(StoreFiles(folder))
    except (LogitStoreError, FileNotFoundError):
        return None
    return plan if plan.compute_fingerprint() == header.plan_fingerprint else None
