"""Sizes that a unit plan needs and a listing does not tell: row groups, and bytes after decompression."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import zstandard

from logitstore.corpus.blocks import BLOCK_BYTES, ZSTD_WINDOW_BYTES, open_range_reader
from logitstore.corpus.files import NUM_LISTING_THREADS, CorpusFile, CorpusSettings, StorageOptions, reading
from logitstore.corpus.parquet import read_row_group_bytes
from logitstore.corpus.units import UnitTable, plan_units
from logitstore.errors import ConfigError

# Compressed bytes that an estimate is made from.
PROBE_BYTES = 1024 * 1024


def build_unit_table(
    files: Sequence[CorpusFile],
    unit_bytes: int,
    settings: CorpusSettings,
    storage_options: StorageOptions | None = None,
) -> UnitTable:
    """The unit plan of a corpus, see `plan_units`; reads Parquet footers and the first MiB of compressed files.

    Raises:
        ConfigError: a file is damaged or lacks a column, or `unit_bytes` is less than 1.
        IncompatibleStoreError: a file has another size than when it was listed.
        OutsideError: a filesystem cannot be read.
    """

    def measure(i: int) -> list[int]:
        if files[i].format == "parquet":
            return read_row_group_bytes(files[i], settings, storage_options)
        return [estimate_decompressed_bytes(files[i], storage_options)]

    unknown = [i for i, file in enumerate(files) if file.bytes and _needs_measuring(file)]
    with ThreadPoolExecutor(NUM_LISTING_THREADS) as executor:
        sizes = dict(zip(unknown, executor.map(measure, unknown), strict=True))
    return plan_units(
        files,
        unit_bytes,
        row_group_bytes_of=sizes.__getitem__,
        decompressed_bytes_of=lambda i: sizes[i][0],
    )


def estimate_decompressed_bytes(file: CorpusFile, storage_options: StorageOptions | None = None) -> int:
    """Size of a compressed file after decompression, from the ratio of its first MiB; the same at every call.

    Raises:
        ConfigError: these bytes are damaged.
        IncompatibleStoreError, OutsideError: see `open_range_reader`.
    """
    count: Callable[[bytes], int] = _count_zstd if file.compression == "zstd" else _count_gzip
    with reading(file.path):
        stream = io.BufferedReader(open_range_reader(file, storage_options), PROBE_BYTES)
        probe = stream.read(PROBE_BYTES)
        try:
            num_bytes = count(probe)
        except (zlib.error, zstandard.ZstdError) as error:
            raise ConfigError(
                f"{file.path}: expected {file.compression} data, found: {error}; replace the file"
            ) from error
    return max(1, round(file.bytes * num_bytes / len(probe)))


def _needs_measuring(file: CorpusFile) -> bool:
    return file.format == "parquet" or file.compression != "none"


def _count_gzip(probe: bytes) -> int:
    num_bytes = 0
    while probe:
        decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        while probe and not decompressor.eof:
            num_bytes += len(decompressor.decompress(probe, BLOCK_BYTES))
            probe = decompressor.unconsumed_tail
        probe = decompressor.unused_data
    return num_bytes


def _count_zstd(probe: bytes) -> int:
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
    stream = decompressor.stream_reader(probe, read_across_frames=True)
    return sum(len(block) for block in iter(lambda: stream.read(BLOCK_BYTES), b""))
