"""`logitstore benchmark codec`: bytes, divergence and speed of every codec, beside the layouts of others."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.benchmark.tables import print_heading, print_table, print_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from logitstore.records import Record, RecordBatch
    from logitstore.shard.layout import ShardHeader
    from logitstore.shard.summary import ShardSummary

_TOP_KS = (32, 64, 128)
_REPEATS = 5


class TeacherChoice(StrEnum):
    """Whose signals are measured."""

    quickstart = "quickstart"
    synthetic = "synthetic"


class MethodChoice(StrEnum):
    """What of the distributions is kept; the drawing methods with their default settings."""

    top_k = "top_k"
    sample = "sample"
    head_tail = "head_tail"


@dataclass(frozen=True, kw_only=True)
class CodecFigures:
    """One codec on one set of signals; `columns` in bytes per position, divergences in nats, rates per second."""

    codec: str
    bytes_per_position: float
    columns: dict[str, float]
    bound_bytes: float
    mean_kl: float
    high_kl: float
    largest_error: float
    encode_rate: str
    decode_rate: str


def codec(
    teacher: Annotated[TeacherChoice, typer.Option(help="Whose signals.")] = TeacherChoice.synthetic,
    positions: Annotated[int, typer.Option(min=1024, help="How many.")] = 16_384,
    method: Annotated[MethodChoice, typer.Option(help="What is kept of a distribution.")] = MethodChoice.top_k,
    explore: Annotated[bool, typer.Option("--explore", help="Also measure encodings that were not taken.")] = False,
) -> None:
    """Write and read signals with every codec: at k = 32, 64 and 128, or of a method that draws.

    The synthetic teacher has 151,936 ids; its signals take about seven seconds for 1,024 positions.

    \b
    Example:
      logitstore benchmark codec --teacher quickstart
      logitstore benchmark codec --method head_tail --positions 8192
    """
    from tools.benchmark.signals import cut_supports

    options = "" if method is MethodChoice.top_k else f" --method {method}"
    options += " --explore" if explore else ""
    print_heading(
        f"logitstore benchmark codec --teacher {teacher} --positions {positions}{options}", "numpy", "pyarrow"
    )
    records, vocab_size = _build_records(teacher, positions, method)
    if method is not MethodChoice.top_k:
        from tools.benchmark.codec_drawn import print_drawn

        print_drawn(records, vocab_size, method, explore=explore)
        return
    _print_signals(records)
    for top_k in _TOP_KS:
        cut = cut_supports(records, top_k)
        _print_figures(top_k, cut, vocab_size)
        if explore and top_k == 64:
            from tools.benchmark.encodings import print_encodings

            print_encodings(cut)


def _build_records(teacher: TeacherChoice, positions: int, method: MethodChoice) -> tuple[list[Record], int]:
    """Signals of a teacher, and the size of its vocabulary."""
    from logitstore.teacher.protocol import HeadTailMethod, Method, SampleMethod, TopKMethod
    from tools.benchmark.signals import build_quickstart_records
    from tools.benchmark.synthetic_teacher import VOCAB_SIZE, build_drawn_records, build_synthetic_records

    most = max(_TOP_KS)
    methods: dict[MethodChoice, Method] = {
        MethodChoice.top_k: TopKMethod(k=most),
        MethodChoice.sample: SampleMethod(),
        MethodChoice.head_tail: HeadTailMethod(),
    }
    if teacher is TeacherChoice.quickstart:
        return list(build_quickstart_records(positions, methods[method])), 4096
    if method is MethodChoice.top_k:  # in numpy, without torch
        return list(build_synthetic_records(positions // 1024, most)), VOCAB_SIZE
    return list(build_drawn_records(positions // 1024, methods[method])), VOCAB_SIZE


def _print_signals(records: list[Record]) -> None:
    import numpy as np

    from tools.benchmark.signals import compute_entropy_bits

    entropy = np.concatenate([record.signal.entropy for record in records])
    tokens = np.concatenate([record.token_ids[1:] for record in records])
    supports = [record.signal.support_ids.reshape(record.num_positions, -1) for record in records]
    spread = [compute_entropy_bits(np.concatenate([ids[:, :k].ravel() for ids in supports])) for k in _TOP_KS]
    print_text(
        f"{len(entropy):,} positions, entropy {entropy.mean():.2f} nats in the mean; order-0 entropy of the tokens "
        f"{compute_entropy_bits(tokens):.1f} bits,\nof the ids in supports of {', '.join(map(str, _TOP_KS))}: "
        f"{', '.join(f'{bits:.1f}' for bits in spread)} bits"
    )


def _print_figures(top_k: int, records: list[Record], vocab_size: int) -> None:
    from logitstore.shard.codec import CompactCodec, Float16Codec, Float32Codec
    from tools.benchmark.peers import measure_peers

    figures = measure_codecs(records, vocab_size, (CompactCodec(), Float16Codec(), Float32Codec()))
    peers = measure_peers(records, vocab_size, top_k)
    yardstick = peers[0].packed_bytes
    assert yardstick is not None
    rows: list[list[object]] = [
        [
            f"k = {top_k}, {found.codec}",
            f"{found.bytes_per_position:.1f}",
            f"{found.bytes_per_position / yardstick:.2f}",
            f"{found.mean_kl:.1e}",
            f"{found.high_kl:.1e}",
            f"{found.largest_error:.3f}",
            f"{found.bytes_per_position / found.bound_bytes:.3f}",
            found.encode_rate,
            found.decode_rate,
        ]
        for found in figures
    ]
    rows += [
        [
            f"k = {top_k}, {peer.name}" + (f", {peer.packed_bytes} bytes packed" if peer.packed_bytes else ""),
            f"{peer.bytes_per_position:.1f}",
            f"{peer.bytes_per_position / yardstick:.2f}",
            "–" if peer.mean_kl is None else f"{peer.mean_kl:.1e}",
            "–" if peer.high_kl is None else f"{peer.high_kl:.1e}",
            *["–"] * 4,
        ]
        for peer in peers
    ]
    header = ["", "bytes per position", "of DistillKit exact, packed", "mean KL", "99.9% KL", "largest error"]
    print_table([*header, "of order-0 bound", "encode /s", "decode /s"], rows)
    compact = figures[0]
    parts = ", ".join(f"{name} {size:.2f}" for name, size in compact.columns.items() if size >= 0.01)
    print_text(f"k = {top_k}, compact, bytes per position: {parts}")


def measure_codecs(records: list[Record], vocab_size: int, codecs: tuple[object, ...]) -> list[CodecFigures]:
    """Write and read records with codecs, in turns; one core."""
    from logitstore.shard.layout import FORMAT_VERSION, ShardHeader
    from logitstore.shard.writer import ShardSettings, write_shard
    from tools.benchmark.timing import format_rate, time_in_turns

    positions = sum(record.num_positions for record in records)
    with tempfile.TemporaryDirectory(prefix="logitstore-codec-") as folder:
        runs: dict[str, Callable[[], object]] = {}
        summaries, headers = {}, {}
        for chosen in codecs:
            header = ShardHeader.model_validate(
                {
                    "format_version": FORMAT_VERSION,
                    "unit": 0,
                    "plan_fingerprint": "0" * 64,
                    "vocab_size": vocab_size,
                    "codec": chosen,
                    "is_drawn": records[0].signal.support_draws is not None,
                }
            )
            name = header.codec.kind
            path, settings = Path(folder, name), ShardSettings(codec=header.codec)
            headers[name], summaries[name] = header, write_shard(path, records, header, settings)

            def write(path: Path = path, header: ShardHeader = header, settings: ShardSettings = settings) -> None:
                write_shard(path, records, header, settings)

            def read(path: Path = path, summary: ShardSummary = summaries[name]) -> None:
                read_shard(path, summary)

            runs |= {f"{name} write": write, f"{name} read": read}
        timings = time_in_turns(runs, _REPEATS)
        return [
            _build_figures(
                records,
                Path(folder, name),
                summaries[name],
                read_shard(Path(folder, name), summaries[name]),
                encode_rate=format_rate(positions, timings[f"{name} write"]),
                decode_rate=format_rate(positions, timings[f"{name} read"]),
            )
            for name in headers
        ]


def read_shard(path: Path, summary: ShardSummary) -> list[RecordBatch]:
    """Every row group of a shard, as a reader of a store does it: digest, page checksums, decoding."""
    from logitstore.shard.reader import check_digest, decode_row_group, read_footer

    data = path.read_bytes()
    metadata, header = read_footer(data[summary.footer_offset :], str(path))
    batches = []
    for index, group in enumerate(summary.row_groups):
        part = data[group.offset : group.offset + group.bytes]
        check_digest(part, group.bytes, group.sha256, where=str(path), what_to_do="")
        batches.append(
            decode_row_group(metadata, header, index, group.offset, part, with_documents=False, where=str(path))
        )
    return batches


def _build_figures(
    records: list[Record], path: Path, summary: ShardSummary, batches: list[RecordBatch], **rates: str
) -> CodecFigures:
    import numpy as np

    from logitstore.records import RecordBatch
    from tools.benchmark.signals import compute_kl

    start, divergences, errors = 0, [], []
    for batch in batches:
        exact = RecordBatch.from_records(records[start : start + len(batch)])
        divergences.append(compute_kl(exact, batch))
        errors.append(float(np.abs(exact.support_logprobs - batch.support_logprobs).max()))
        start += len(batch)
    kl = np.concatenate(divergences)
    columns: dict[str, float] = {}
    for group in summary.row_groups:
        for column, size in group.column_bytes.items():
            columns[column] = columns.get(column, 0.0) + size / summary.positions
    return CodecFigures(
        codec=path.name,
        bytes_per_position=summary.bytes / summary.positions,
        columns=columns,
        bound_bytes=sum(_compute_bound(path, column) for column in columns) / 8 / summary.positions,
        mean_kl=float(kl.mean()),
        high_kl=float(np.percentile(kl, 99.9)),
        largest_error=max(errors),
        **rates,
    )


def _compute_bound(path: Path, column: str) -> float:
    """Bits of a column's symbols at their order-0 entropy; 0 for columns of documents and of whole records."""
    import pyarrow.parquet as pq

    from logitstore.shard.layout import MEAN_COLUMNS, SPLIT_COLUMNS
    from tools.benchmark.signals import compute_entropy_bits

    if column not in SPLIT_COLUMNS or column in MEAN_COLUMNS:
        return 0.0
    symbols = pq.read_table(path, columns=[column])[column].combine_chunks().flatten().to_numpy()
    return compute_entropy_bits(symbols) * len(symbols)
