from __future__ import annotations

import tracemalloc
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from logitstore.corpus.lines import count_newlines, iterate_lines

CONTENTS = st.text(alphabet="ab\r\n", max_size=60).map(str.encode)


def cut(content: bytes, block_bytes: int) -> list[bytes]:
    return [content[i : i + block_bytes] for i in range(0, len(content), block_bytes)]


def read(content: bytes, start: int, stop: int | None, block_bytes: int, limit_bytes: int) -> list[tuple[int, object]]:
    blocks = cut(content[max(0, start - 1) :], block_bytes)
    return [(line.offset, line.content) for line in iterate_lines(blocks, start, stop, limit_bytes)]


@given(content=CONTENTS, block_bytes=st.integers(1, 70), limit_bytes=st.integers(0, 20))
def test_lines_of_a_whole_stream_are_its_lines(content: bytes, block_bytes: int, limit_bytes: int) -> None:
    expected, offset = [], 0
    for line in content.removesuffix(b"\n").split(b"\n") if content else []:
        expected.append((offset, line if len(line) <= limit_bytes else None))
        offset += len(line) + 1
    assert read(content, 0, None, block_bytes, limit_bytes) == expected


@given(content=CONTENTS, cuts=st.lists(st.integers(0, 65)), block_bytes=st.integers(1, 70))
def test_lines_of_consecutive_parts_are_those_of_the_whole(content: bytes, cuts: list[int], block_bytes: int) -> None:
    bounds = [0, *sorted(cuts), None]
    parts = [
        line
        for start, stop in pairwise(bounds)
        if start is not None
        for line in read(content, start, stop, block_bytes, 100)
    ]
    assert parts == read(content, 0, None, block_bytes, 100)


def test_lines_longer_than_the_limit_are_not_held() -> None:
    blocks = (b"x" * 100_000 for _ in range(200))
    tracemalloc.start()
    (line,) = iterate_lines(blocks, 0, None, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (line.num_bytes, line.content) == (20_000_000, None)
    assert peak < 1_000_000


def test_lines_of_a_part_inside_one_line_read_no_further_than_the_part() -> None:
    blocks = iter([b"x" * 10, b"y" * 10, b"\nz\n"])
    assert list(iterate_lines(blocks, 1, 5, 100)) == []
    assert next(blocks) == b"y" * 10


@given(content=CONTENTS, stop=st.integers(0, 70), block_bytes=st.integers(1, 70))
def test_count_newlines_stops_at_the_offset(content: bytes, stop: int, block_bytes: int) -> None:
    assert count_newlines(cut(content, block_bytes), stop) == content[:stop].count(b"\n")
