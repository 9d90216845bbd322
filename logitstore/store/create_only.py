"""Create-only writes with a certain answer; every object that two writers may race for is written this way."""

from __future__ import annotations

import uuid
from collections.abc import Callable

from logitstore.errors import IncompatibleStoreError, OutsideError
from logitstore.store.files import StoreFiles

_TRIES = 5


def create_or_read_back(
    files: StoreFiles, path: str, data: bytes, is_ours: Callable[[bytes], bool] | None = None
) -> bool:
    """Create an object unless its name is taken; returns whether what is stored there now is ours.

    "Something is there" and "the request failed" are both ambiguous after a lost response, so every doubt is settled
    by reading back: our object means won, another one means lost, none means try again.

    Args:
        files: the store.
        path: of the object.
        data: its bytes.
        is_ours: whether the bytes found under the name are our object; by default, whether they are `data`.
    Raises:
        OutsideError: the storage kept failing or contradicting itself; nothing of ours is stored as far as one can
            read.
    """
    trouble: OutsideError | None = None
    for _ in range(_TRIES):
        try:
            if files.create(path, data):
                return True
        except OutsideError as error:
            trouble = error
        try:
            found = files.read(path)
        except FileNotFoundError:
            continue
        except OutsideError as error:
            trouble = error
            continue
        return found == data or (is_ours is not None and is_ours(found))
    raise trouble or OutsideError(f"{files.url}/{path}: neither created nor found after {_TRIES} tries; run it again")


def check_create_only(files: StoreFiles) -> None:
    """Prove that a storage keeps its promise of create-only objects, by breaking it once on purpose.

    Raises:
        IncompatibleStoreError: a second create on one name was accepted.
    """
    path = f"probe/{uuid.uuid4().hex}"
    create_or_read_back(files, path, b"1")
    try:
        if create_or_read_back(files, path, b"2"):
            raise IncompatibleStoreError(
                f"{files.url}: expected a second create-only put on one name to fail, found it accepted; two "
                "captures at once could damage this store. Use other storage, or set single_writer: true and "
                "never run two captures into it"
            )
    finally:
        files.delete(path)
