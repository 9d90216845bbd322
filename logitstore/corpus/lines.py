"""Lines of a byte stream, with their offsets, in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """A line without its newline.

    Attributes:
        offset: where it begins, in bytes of the stream.
        index: 0-based, among the lines asked for.
        num_bytes: its length.
        content: its bytes, or None where they are more than the limit.
    """

    offset: int
    index: int
    num_bytes: int
    content: bytes | None


def iterate_lines(blocks: Iterable[bytes], start: int, stop: int | None, limit_bytes: int) -> Iterator[Line]:
    """Yield the lines that begin in [start, stop) of a stream; stop None is the end of the stream.

    A newline at the very end begins no line. At most `limit_bytes` and a block are held.

    Args:
        blocks: the stream from the byte before `start` on (from 0 where start is 0): that byte tells whether a line
            begins at `start`.
        start, stop: offsets in the stream.
        limit_bytes: longer lines come without their content.
    """
    offset = start
    blocks = iter(blocks)
    if start > 0:
        offset, blocks = _skip_to_line(blocks, start - 1, stop)
    index = num_bytes = 0
    pieces: list[bytes] = []
    for block in blocks:
        cursor = 0
        while stop is None or offset < stop:
            newline = block.find(b"\n", cursor)
            end = len(block) if newline < 0 else newline
            num_bytes += end - cursor
            if num_bytes <= limit_bytes:
                pieces.append(block[cursor:end])
            else:
                pieces.clear()
            if newline < 0:
                break
            yield Line(offset, index, num_bytes, b"".join(pieces) if num_bytes <= limit_bytes else None)
            pieces.clear()
            index, offset, num_bytes, cursor = index + 1, offset + num_bytes + 1, 0, newline + 1
        else:
            return
    if num_bytes:
        yield Line(offset, index, num_bytes, b"".join(pieces) if num_bytes <= limit_bytes else None)


def _skip_to_line(blocks: Iterator[bytes], offset: int, stop: int | None) -> tuple[int, Iterator[bytes]]:
    """Offset just after the first newline of a stream that begins at `offset`, and the stream from there on."""
    for block in blocks:
        newline = block.find(b"\n")
        if newline >= 0:
            return offset + newline + 1, itertools.chain([block[newline + 1 :]], blocks)
        offset += len(block)
        if stop is not None and offset >= stop:
            break
    return offset, iter(())


def count_newlines(blocks: Iterable[bytes], stop: int) -> int:
    """Newlines among the first `stop` bytes of a stream."""
    count = 0
    for block in blocks:
        count += block.count(b"\n", 0, max(0, min(stop, len(block))))
        stop -= len(block)
        if stop <= 0:
            break
    return count
