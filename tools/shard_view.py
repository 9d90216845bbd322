"""A single shard file: header, rows and columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from logitstore.errors import CorruptShardError, StoreNotFoundError
from logitstore.settings import Settings
from logitstore.shard.layout import ShardHeader
from logitstore.shard.reader import read_footer
from logitstore.store.files import StoreFiles
from tools.look import build_facts, build_table, format_bytes, format_count, format_share

if TYPE_CHECKING:
    import pyarrow.parquet as pq
    from rich.console import RenderableType

# Length of the footer and the file's closing mark, at the end of every Parquet file.
_CLOSING_BYTES = 8


class ColumnFigures(Settings):
    """One column of a shard; `bytes` are compressed, page headers included."""

    name: str
    type: str
    encodings: tuple[str, ...]
    compression: str
    values: int
    bytes: int
    uncompressed_bytes: int


class ShardView(Settings):
    """A shard as its footer describes it. `footer_bytes` is what lies behind the last row group."""

    path: str
    header: ShardHeader
    bytes: int
    footer_bytes: int
    records: int
    row_groups: int
    positions: int
    support_entries: int
    mean_support: float
    bytes_per_position: float
    columns: tuple[ColumnFigures, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedShard:
    """A shard of which the footer was read: `name` in `files`, its size and that of the footer."""

    files: StoreFiles
    name: str
    bytes: int
    footer_bytes: int
    metadata: pq.FileMetaData
    header: ShardHeader


def open_shard(url: str) -> OpenedShard:
    """Read the footer of a shard file.

    Raises:
        StoreNotFoundError: there is no such file.
        CorruptShardError: it is no Parquet file.
        IncompatibleStoreError: it is no shard, or one of another format version.
    """
    folder, _, name = url.rpartition("/")
    files = StoreFiles(folder or ("/" if url.startswith("/") else "."))
    size = files.find_bytes(name)
    if size is None:
        raise StoreNotFoundError(f"{url}: expected a shard, found no such file; check the path")
    length = int.from_bytes(files.read(name, max(0, size - _CLOSING_BYTES), size)[:4], "little")
    if length + _CLOSING_BYTES > size:
        raise CorruptShardError(
            f"{url}: expected a Parquet file, found {size} bytes without a footer; verify the store"
        )
    footer = files.read(name, size - length - _CLOSING_BYTES, size)
    metadata, header = read_footer(footer, url)
    return OpenedShard(files=files, name=name, bytes=size, footer_bytes=len(footer), metadata=metadata, header=header)


def read_shard_view(url: str) -> ShardView:
    """Look at one shard file; reads its footer only.

    Raises:
        StoreNotFoundError, CorruptShardError, IncompatibleStoreError: as in `open_shard`.
    """
    shard = open_shard(url)
    metadata, size = shard.metadata, shard.bytes
    columns = _describe_columns(metadata)
    values = {column.name: column.values for column in columns}
    positions = values["loss_mask"]
    return ShardView(
        path=url,
        header=shard.header,
        bytes=size,
        footer_bytes=shard.footer_bytes,
        records=metadata.num_rows,
        row_groups=metadata.num_row_groups,
        positions=positions,
        support_entries=values["support_ids"],
        mean_support=values["support_ids"] / max(1, positions),
        bytes_per_position=size / max(1, positions),
        columns=tuple(columns),
    )


def _describe_columns(metadata: pq.FileMetaData) -> list[ColumnFigures]:
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = []
    for i in range(metadata.num_columns):
        chunks: list[Any] = [group.column(i) for group in groups]
        columns.append(
            ColumnFigures(
                name=metadata.schema.column(i).path.split(".")[0],
                type=str(metadata.schema.to_arrow_schema().field(i).type),
                encodings=tuple(sorted({encoding for chunk in chunks for encoding in chunk.encodings})),
                compression=", ".join(sorted({chunk.compression for chunk in chunks})).lower(),
                values=sum(chunk.num_values for chunk in chunks),
                bytes=sum(chunk.total_compressed_size for chunk in chunks),
                uncompressed_bytes=sum(chunk.total_uncompressed_size for chunk in chunks),
            )
        )
    return columns


def render_shard_view(shard: ShardView) -> list[RenderableType]:
    """What `logitstore inspect SHARD.parquet` shows."""
    header = shard.header
    facts = build_facts(
        [
            ("shard", shard.path),
            ("unit", header.unit),
            ("format version", header.format_version),
            ("plan", header.plan_fingerprint),
            ("vocabulary", f"{format_count(header.vocab_size)} ids"),
            ("codec", header.codec.kind),
            ("supports", "partly or wholly drawn, see support_draws" if header.is_drawn else "the likeliest ids"),
            ("records", f"{format_count(shard.records)} in {format_count(shard.row_groups)} row groups"),
            ("positions", format_count(shard.positions)),
            ("bytes", f"{format_bytes(shard.bytes)}, everything included"),
            ("per position", f"{shard.bytes_per_position:.1f} bytes, {shard.mean_support:.1f} support entries"),
        ]
    )
    rows = [
        (
            column.name,
            column.type.replace("list<element: ", "list<").replace(" not null", ""),
            format_count(column.values),
            format_bytes(column.bytes),
            format_share(column.bytes / shard.bytes),
            f"{column.uncompressed_bytes / max(1, column.bytes):.1f}×",
        )
        for column in shard.columns
    ]
    rest = shard.bytes - sum(column.bytes for column in shard.columns)
    rows.append(("footer", "", "", format_bytes(rest), format_share(rest / shard.bytes), ""))
    table = build_table("Columns", ["column", "type", "#values", "#bytes", "#share", "#compressed"], rows)
    return [facts, table]
