"""JSON objects that carry their own digest, so that a flipped bit in a plan or a commit is noticed.

A sealed object begins with `{"sha256":"…",`, 78 bytes; the digest is that of its bytes with these replaced by `{`. It
stays plain JSON for whoever does not care.
"""

from __future__ import annotations

import hashlib
import re

_SEAL = re.compile(rb'\{"sha256":"([0-9a-f]{64})",')


class BrokenSealError(ValueError):
    """The bytes are not those that were sealed; says why."""


def seal(data: bytes) -> bytes:
    """The same JSON object with its digest in front; it has at least one key."""
    assert data.startswith(b"{"), data[:20]
    return b'{"sha256":"' + hashlib.sha256(data).hexdigest().encode() + b'",' + data[1:]


def unseal(data: bytes) -> bytes:
    """Undo `seal`.

    Raises:
        BrokenSealError: there is no digest, or it is that of other bytes.
    """
    match = _SEAL.match(data)
    if match is None:
        raise BrokenSealError(f"no digest in front: the object begins with {data[:20]!r}")
    inner = b"{" + data[match.end() :]
    found = hashlib.sha256(inner).hexdigest()
    if found != match[1].decode():
        raise BrokenSealError(
            f"bytes that are not the ones that were written: sha256 in front {match[1].decode()}, of the bytes {found}"
        )
    return inner
