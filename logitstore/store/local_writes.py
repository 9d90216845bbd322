"""Writing on local file systems: an object appears whole under its name, and stays after a power cut."""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path

from logitstore.errors import ConfigError, IncompatibleStoreError

_NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


def create_local(target: Path, data: bytes) -> bool:
    """Write a file unless there is one of that name; returns whether it was written.

    Raises:
        IncompatibleStoreError: the file system has no hard links, without which that promise cannot be kept.
    """
    try:
        _write(target, data, _link)
    except FileExistsError:
        return False
    return True


def replace_local(target: Path, data: bytes | Path) -> None:
    """Write a file, or a copy of one, whole, in place of what may be there."""
    _write(target, data, os.replace)


def is_leftover(name: str) -> bool:
    """Whether a file's name is that of a write that was killed."""
    return _LEFTOVER.fullmatch(name) is not None


def _write(target: Path, data: bytes | Path, publish: Callable[[Path, Path], None]) -> None:
    """Write beside the target, then publish: a kill leaves either nothing under the name or all of it."""
    _make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            if isinstance(data, bytes):
                file.write(data)
            else:
                with data.open("rb") as source:
                    while block := source.read(1 << 20):
                        file.write(block)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, target)
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{folder}: expected a folder, found a file there or above it; check the address") from error
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """A new name is safe only when its folder is; Windows has no such operation."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        raise IncompatibleStoreError(
            f"{target}: expected a file system with hard links, found one without ({error.strerror}): no other "
            "operation creates a whole file only if its name is free; put the store on another file system or on "
            "object storage"
        ) from error
