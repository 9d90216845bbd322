"""What disks have to say, in the house's words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from logitstore.errors import LogitStoreError, OutsideError


def describe_unusable_files(where: str | Path, error: Exception) -> OutsideError:
    """The error of files below a path that cannot be read or written, as to be raised."""
    return OutsideError(
        f"{where}: expected files that can be read and written, found {type(error).__name__}: {error}; look to room "
        "and permissions, and run the same command again"
    )


@contextmanager
def writing(where: str | Path) -> Iterator[None]:
    """Have what the block cannot write fail as trouble from outside, which the same command may get past later.

    Args:
        where: the block writes.

    Raises:
        OutsideError: there is no room, or no permission.
    """
    try:
        yield
    except LogitStoreError:
        raise
    except (OSError, SafetensorError) as error:  # safetensors has a word of its own for a full disk
        raise describe_unusable_files(where, error) from error
