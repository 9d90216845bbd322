"""Digests of bytes: damage is found the first time and every further time, whatever is remembered."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

import pytest

from logitstore.shard import digests
from logitstore.shard.digests import has_sha256

DATA = random.Random(0).randbytes(1000)
SHA256 = hashlib.sha256(DATA).digest()


@pytest.fixture(autouse=True, params=["xxhash", "no xxhash"])
def known(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[bytes, int]]:
    """What is remembered: nothing yet, and nothing ever where xxhash is missing."""
    memory: dict[bytes, int] = {}
    monkeypatch.setattr(digests, "_known", memory)
    digests._find_xxh3.cache_clear()
    if request.param == "xxhash":
        pytest.importorskip("xxhash")
    else:
        monkeypatch.setitem(__import__("sys").modules, "xxhash", None)
    yield memory
    digests._find_xxh3.cache_clear()


def test_bytes_have_their_digest_however_often_they_are_asked(known: dict[bytes, int]) -> None:
    assert [has_sha256(DATA, SHA256) for _ in range(3)] == [True] * 3
    assert set(known) <= {SHA256}


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_a_flipped_bit_is_found_before_and_after_the_bytes_were_seen(is_known: bool, place: int) -> None:
    if is_known:
        assert has_sha256(DATA, SHA256)
    damaged = bytearray(DATA)
    damaged[place] ^= 1
    for other in (bytes(damaged), DATA[:-1], DATA + b"\0", b""):
        assert not has_sha256(other, SHA256)
    assert has_sha256(DATA, SHA256)


def test_known_bytes_have_no_other_digest() -> None:
    assert has_sha256(DATA, SHA256)
    assert not has_sha256(DATA, hashlib.sha256(b"other").digest())


def test_bytes_that_were_seen_are_not_digested_again(known: dict[bytes, int], monkeypatch: pytest.MonkeyPatch) -> None:
    has_sha256(DATA, SHA256)
    monkeypatch.setattr(digests, "hashlib", None)
    if known:
        assert has_sha256(DATA, SHA256)
    else:
        with pytest.raises(AttributeError):
            has_sha256(DATA, SHA256)


def test_what_is_remembered_is_another_number_in_every_process(known: dict[bytes, int]) -> None:
    remembered = set()
    for _ in range(2):
        digests._find_xxh3.cache_clear()
        known.clear()
        has_sha256(DATA, SHA256)
        remembered |= set(known.values())
    assert len(remembered) in (0, 2)


def test_no_more_is_remembered_than_said(known: dict[bytes, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "MOST_KNOWN", 3)
    for number in range(10):
        data = bytes([number])
        assert has_sha256(data, hashlib.sha256(data).digest())
    assert len(known) in (0, 3)
