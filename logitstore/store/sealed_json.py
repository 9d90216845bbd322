"""JSON objects that carry their own digest, so that a flipped bit in a plan or a commit is noticed.

A sealed object begins with `{"sha256":"…",`, 77 bytes; the digest is that of its bytes with these replaced by `{`. It
stays plain JSON for whoever does not care.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from logitstore.shard.layout import FORMAT_VERSION

_SEAL = re.compile(rb'\{"sha256":"([0-9a-f]{64})",')


class BrokenSealError(ValueError):
    """The bytes are not those that were sealed; says why."""


class NotSealedError(BrokenSealError):
    """There is no digest in front: damage, or another program's object."""


def seal(data: bytes) -> bytes:
    """The same JSON object with its digest in front; it has at least one key."""
    assert data.startswith(b"{"), data[:20]
    return b'{"sha256":"' + hashlib.sha256(data).hexdigest().encode() + b'",' + data[1:]


def unseal(data: bytes) -> bytes:
    """Undo `seal`.

    Raises:
        NotSealedError: there is no digest.
        BrokenSealError: it is that of other bytes.
    """
    match = _SEAL.match(data)
    if match is None:
        raise NotSealedError(f"no digest in front: the object begins with {data[:20]!r}")
    inner = b"{" + data[match.end() :]
    found = hashlib.sha256(inner).hexdigest()
    if found != match[1].decode():
        raise BrokenSealError(
            f"bytes that are not the ones that were written: sha256 in front {match[1].decode()}, of the bytes {found}"
        )
    return inner


def read_sealed(data: bytes) -> tuple[dict[str, Any], object]:
    """Values of an object, and the format version that it gives.

    An object of another version comes without a look at its seal, of which that version may know nothing.

    Raises:
        BrokenSealError: the object is damaged.
        ValueError, KeyError, TypeError: it is no JSON object with a format version.
    """
    try:
        values: dict[str, Any] = json.loads(unseal(data))
    except NotSealedError:
        values = json.loads(data)
        if values["format_version"] == FORMAT_VERSION:
            raise
    return values, values["format_version"]
