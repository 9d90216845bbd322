"""What the page's script reads: the sampled records with all voices, in a few bytes per position."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from logitstore.records import Record
from tools.store_report.numbers import encode_nats
from tools.store_report.sample import Sample
from tools.store_report.token_table import TokenTable, escape_invisible
from tools.store_report.voices import Voice

FORMAT = 1
# What Python's base 85 has and HTML reads as its own, by what neither has.
_INTO_HTML = bytes.maketrans(b"<>&", b",./")
_FROM_HTML = bytes.maketrans(b",./", b"<>&")


def build_payload(sample: Sample, tokens: TokenTable) -> str:
    """The records as a zlib stream in base 85: the length of a header in 4 bytes, the header in JSON, the columns.

    A column of numbers of several bytes is written as all their lowest bytes, then all the next ones: where high bytes
    are mostly the same, they then cost next to nothing. `columns` of the header lists them in order. A column whose
    name ends with `Palette` has the values that the next column counts from 0, the most frequent first.

    Returns:
        ASCII text without `<`, `>`, `&` or quotes. Five characters are four bytes, the last ones of which are zeros
        that follow the stream; its own length stands before them and a colon.
    """
    columns = list(_list_columns(sample, tokens))
    header = {
        "format": FORMAT,
        "records": [_describe_record(record) for record in sample.records],
        "voices": [{"name": voice.name, "isDrawn": voice.is_drawn} for voice in sample.voices],
        "texts": tokens.texts,
        "characters": tokens.characters,
        "columns": [
            {"voice": voice, "name": name, "bytes": values.dtype.itemsize, "length": len(values)}
            for voice, name, values in columns
        ],
    }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    planes = b"".join(split_planes(values) for _, _, values in columns)
    data = len(text).to_bytes(4, "little") + text + planes
    stream = zlib.compress(data, 9)
    padded = stream + bytes(-len(stream) % 4)
    return f"{len(stream)}:{base64.b85encode(padded).translate(_INTO_HTML).decode('ascii')}"


def read_payload(payload: str) -> tuple[dict[str, Any], list[dict[str, np.ndarray]]]:
    """The header of `build_payload`, and the columns by name: first those of no voice, then those of each.

    The page's script reads them likewise.
    """
    num_bytes, _, text = payload.partition(":")
    data = zlib.decompress(base64.b85decode(text.encode().translate(_FROM_HTML))[: int(num_bytes)])
    start = 4 + int.from_bytes(data[:4], "little")
    header = json.loads(data[4:start])
    columns: list[dict[str, np.ndarray]] = [{} for _ in range(1 + len(header["voices"]))]
    for column in header["columns"]:
        of_voice, name = columns[0 if column["voice"] is None else 1 + column["voice"]], column["name"]
        size = column["bytes"] * column["length"]
        planes = np.frombuffer(data[start : start + size], dtype=np.uint8).reshape(column["bytes"], -1)
        values = np.ascontiguousarray(planes.T).view(f"<u{column['bytes']}").ravel()
        palette = of_voice.pop(f"{name}Palette", None)
        of_voice[name] = values if palette is None else palette[values]
        start += size
    return header, columns


def split_planes(values: np.ndarray) -> bytes:
    """All lowest bytes of unsigned integers, then all the next ones."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return little.view(np.uint8).reshape(len(values), values.dtype.itemsize).T.tobytes()


def _list_columns(sample: Sample, tokens: TokenTable) -> Iterator[tuple[int | None, str, np.ndarray]]:
    """Voice, name and values of every column; None is of no voice."""
    yield None, "vocabulary", tokens.token_ids.astype(np.uint32)
    firsts = np.array([record.token_ids[0] for record in sample.records], dtype=np.int64)
    yield None, "firstTokens", _shrink(tokens.find_places(firsts), tokens)
    yield None, "isTaught", _join([record.loss_mask for record in sample.records]).astype(np.uint8)
    for number, voice in enumerate(sample.voices):
        for name, values in _list_voice_columns(voice, tokens):
            yield number, name, values


def _list_voice_columns(voice: Voice, tokens: TokenTable) -> Iterator[tuple[str, np.ndarray]]:
    for name, values in voice.list_columns().items():
        if name == "token_ids":
            yield "tokens", _shrink(tokens.find_places(values), tokens)
        else:
            first, *others = name.split("_")
            camel_case = first + "".join(other.title() for other in others)
            if values.dtype == np.uint8:
                yield camel_case, values
                continue
            palette, places = build_palette(values)
            yield f"{camel_case}Palette", palette
            yield camel_case, places


def build_palette(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[U] the different values, the most frequent first, and [N] uint16 places of values in it."""
    palette, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    ranks = np.empty(len(order), dtype=np.uint16)
    ranks[order] = np.arange(len(order))
    return palette[order], ranks[inverse]


def _shrink(places: np.ndarray, tokens: TokenTable) -> np.ndarray:
    return places.astype(np.uint16 if len(tokens.token_ids) <= 1 << 16 else np.uint32)


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0)


def _describe_record(record: Record) -> dict[str, Any]:
    entropy = record.signal.entropy.astype(np.float64)
    known = entropy[~np.isnan(entropy)]
    [mean] = encode_nats(np.array([known.mean() if len(known) else np.nan]))
    return {
        "address": str(record.address),
        "positions": record.num_positions,
        "entropy": int(mean),
        "documents": [
            [escape_invisible(part.document_id), part.start, part.document_offset, escape_invisible(part.label or "")]
            for part in record.documents
        ],
    }
