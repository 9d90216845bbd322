"""What `logitstore benchmark codec` says of the methods that draw."""

from __future__ import annotations

import numpy as np

from logitstore.records import Record, RecordBatch
from logitstore.shard.codec import CompactCodec, Float16Codec, Float32Codec
from tools.benchmark.codec import measure_codecs
from tools.benchmark.encodings import print_drawn_encodings
from tools.benchmark.tables import print_table, print_text


def print_drawn(records: list[Record], vocab_size: int, method: str, *, explore: bool) -> None:
    """Bytes of a method that draws, by codec and by column; also of other encodings, where asked to explore."""
    batch = RecordBatch.from_records(records)
    assert batch.support_draws is not None
    kept, entries = int((batch.support_draws == 0).sum()), len(batch.support_ids)
    print_text(
        f"{batch.num_positions:,} positions, entropy {batch.entropy.mean():.2f} nats in the mean; per position "
        f"{kept / batch.num_positions:.2f} entries kept, {(entries - kept) / batch.num_positions:.2f} drawn, "
        f"{np.exp(batch.tail_logprob).mean():.3f} of the probability drawn from"
    )
    figures = measure_codecs(records, vocab_size, (CompactCodec(), Float16Codec(), Float32Codec()))
    rows = [
        [
            f"{method}, {found.codec}",
            f"{found.bytes_per_position:.1f}",
            f"{found.mean_kl:.1e}",
            f"{found.largest_error:.3f}",
            found.encode_rate,
            found.decode_rate,
        ]
        for found in figures
    ]
    print_table(["", "bytes per position", "mean KL of head and tail", "largest error", "encode /s", "decode /s"], rows)
    print_table(
        ["bytes per position", *(found.codec for found in figures)],
        [
            [name, *(f"{found.columns[name]:.2f}" if name in found.columns else "–" for found in figures)]
            for name in dict.fromkeys(name for found in figures for name in found.columns)
        ],
    )
    if explore:
        print_drawn_encodings(records)
