"""has_sha256: whether bytes are the ones that a digest is of.

A stream reads the same bytes every epoch, and SHA-256 takes an eighth of what reading a record takes. So bytes that had
their SHA-256 once leave their XXH3, 64 bits, in the memory of this process, where xxhash is installed (`pip install
logitstore[fast]`), and are held to that when the same digest is asked for again. Damage passes that once in 2^64
times. XXH3 alone is no protection from somebody who makes up bytes with it in mind, such as a writer of files in a
cache that many share: so every process has a seed of its own, which nobody else knows.
"""

from __future__ import annotations

import functools
import hashlib
import secrets
from collections.abc import Callable

# Some 20 MB; of further bytes the SHA-256 is computed every time.
MOST_KNOWN = 1 << 17

_known: dict[bytes, int] = {}


def has_sha256(data: bytes, sha256: bytes) -> bool:
    """Whether bytes have a digest."""
    compute_xxh3 = _find_xxh3()
    xxh3 = None if compute_xxh3 is None else compute_xxh3(data)
    if xxh3 is not None and _known.get(sha256) == xxh3:
        return True
    if hashlib.sha256(data).digest() != sha256:
        return False
    if xxh3 is not None and len(_known) < MOST_KNOWN:
        _known[sha256] = xxh3
    return True


@functools.lru_cache(maxsize=1)
def _find_xxh3() -> Callable[[bytes], int] | None:
    try:
        import xxhash
    except ImportError:
        return None
    compute: Callable[[bytes], int] = functools.partial(xxhash.xxh3_64_intdigest, seed=secrets.randbits(64))
    return compute
