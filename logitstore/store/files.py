"""The few object operations that a store needs, over any fsspec file system.

Nothing but `create` may be relied on when two writers race: it is the only operation that promises "one of us wins".
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from logitstore.errors import ConfigError, IncompatibleStoreError, OutsideError
from logitstore.storage_clients import build_upload_options, open_filesystem, read_range
from logitstore.storage_errors import find_code, find_status, storage_errors
from logitstore.store.local_writes import create_local, is_leftover, replace_local

# Small objects are bound by round trips: 16 in flight read 1,500 commits a second from a near object store.
PARALLEL_READS = 16
# Objects fetched ahead of a slow consumer: bounds memory at as many commits.
READ_AHEAD = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """One object of a listing; `modified` is seconds since the epoch, None where the file system does not tell."""

    name: str
    bytes: int
    modified: float | None


class StoreFiles:
    """Objects below one URL. Paths are relative to it, with `/` between their parts.

    Args:
        url: any fsspec URL or local path.
        storage_options: passed to fsspec; credentials in them are never stored or printed.
    Raises:
        ConfigError: fsspec does not know the URL, or there is a secret in it.
    """

    def __init__(self, url: str, storage_options: dict[str, Any] | None = None) -> None:
        self.url = url.rstrip("/")
        self.storage_options = dict(storage_options or {})
        self._fs, self._root = open_filesystem(self.url, self.storage_options)
        self._is_local = isinstance(self._fs, LocalFileSystem)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreFiles, (self.url, self.storage_options)

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of an object, or all of it; fewer, or none, where the object ends before.

        Raises:
            FileNotFoundError: there is no such object.
            OutsideError: the storage failed, or sent a range so slowly that it may as well have.
        """
        with self._explain(path):
            try:
                if stop is not None:
                    return read_range(self._fs, self._full(path), start or 0, stop)
                # A start, always: asked for a whole object, s3fs first asks for its size, one more round trip.
                data: bytes = self._fs.cat_file(self._full(path), start=start or 0)
            except Exception as error:
                if _means_past_end(error):
                    return b""
                raise
            return data

    def read_many(self, paths: Sequence[str]) -> Iterator[bytes]:
        """Whole objects in the order asked for, several requests in flight.

        Raises:
            FileNotFoundError: one of them is not there.
            OutsideError: the storage failed.
        """
        for path, data in zip(paths, self._read_ahead(paths), strict=True):
            if data is None:
                raise FileNotFoundError(f"{self.url}/{path}: no such object")
            yield data

    def read_existing(self, paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Path and bytes of each of these objects, in the order asked for; what was deleted meanwhile is left out.

        Raises:
            OutsideError: the storage failed.
        """
        for path, data in zip(paths, self._read_ahead(paths), strict=True):
            if data is not None:
                yield path, data

    def _read_ahead(self, paths: Sequence[str]) -> Iterator[bytes | None]:
        waiting: deque[Future[list[bytes | None]]] = deque()
        # Handing a task to a thread costs more than a small read from a disk: several to a task, where there are many.
        paths_of_task = max(1, min(READ_AHEAD, len(paths)) // PARALLEL_READS)
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            for start in range(0, len(paths), paths_of_task):
                waiting.append(pool.submit(self._read_those_there, paths[start : start + paths_of_task]))
                if len(waiting) * paths_of_task >= READ_AHEAD:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()

    def _read_those_there(self, paths: Sequence[str]) -> list[bytes | None]:
        """Objects, and None for those that are not there."""
        return [self._read_or_none(path) for path in paths]

    def _read_or_none(self, path: str) -> bytes | None:
        try:
            return self.read(path)
        except FileNotFoundError:
            return None

    def exists(self, path: str) -> bool:
        with self._explain(path):
            self._fs.invalidate_cache()
            return bool(self._fs.exists(self._full(path)))

    def find_bytes(self, path: str) -> int | None:
        """Size of an object; None where there is none."""
        with self._explain(path):
            self._fs.invalidate_cache()
            try:
                return int(self._fs.size(self._full(path)))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def list(self, folder: str) -> list[StoredFile]:
        """Objects directly in a folder, by name; empty where there is no such folder."""
        return [file for file in self._list(folder) if not file.name.startswith(".")]

    def list_leftovers(self, folder: str) -> Sequence[StoredFile]:
        """What killed writes left in a folder of a local file system, by name; no object of the store is among it."""
        return [file for file in self._list(folder) if is_leftover(file.name)]

    def _list(self, folder: str) -> Sequence[StoredFile]:
        with self._explain(folder):
            self._fs.invalidate_cache()
            try:
                if self._is_local:
                    return sorted(_list_local(self._full(folder)), key=lambda file: file.name)
                entries = self._fs.ls(self._full(folder), detail=True)
            except FileNotFoundError:
                return []
        files = [_build_stored_file(entry) for entry in entries if entry["type"] == "file"]
        # Without a name: an empty object that object stores and their consoles keep in place of the folder itself.
        return sorted((file for file in files if file.name), key=lambda file: file.name)

    def create(self, path: str, data: bytes) -> bool:
        """Store a small object only if nothing has that name.

        Returns False when something seems to be there. That answer is ambiguous on object stores: a response lost on
        the way makes the client try again and find its own object, so nobody believes it but `create_or_read_back`.

        Raises:
            IncompatibleStoreError: the file system cannot do this.
            OutsideError: the storage failed.
        """
        with self._explain(path, is_write=True):
            if self._is_local:
                return create_local(Path(self._full(path)), data)
            try:
                self._fs.pipe_file(self._full(path), data, mode="create")
            except Exception as error:
                if _means_exists(error):
                    return False
                if find_code(error) in ("NotImplemented", "501") or find_status(error) == 501:
                    raise IncompatibleStoreError(
                        f"{self.url}/{path}: expected storage that can create an object only if its name is free, "
                        f"found one that refuses to ({error}); a store cannot be written there: use other storage"
                    ) from error
                raise
            return True

    def put(self, path: str, data: bytes) -> None:
        """Store an object under a name nobody else uses, replacing what an earlier try left there."""
        with self._explain(path, is_write=True):
            if self._is_local:
                replace_local(Path(self._full(path)), data)
            else:
                self._fs.pipe_file(self._full(path), data)

    def put_file(self, path: str, source: Path) -> None:
        """Upload a local file (in parts where the storage wants that); same terms as `put`."""
        with self._explain(path, is_write=True):
            if self._is_local:
                replace_local(Path(self._full(path)), source)
            else:
                self._upload(path, source)

    def _upload(self, path: str, source: Path) -> None:
        options = build_upload_options(self._fs, source.stat().st_size)
        for is_last_try in (False, True):
            try:
                self._fs.put_file(str(source), self._full(path), **options)
            except FileNotFoundError as error:
                # The answer to the last step of an upload in parts was lost, and there is nothing more to finish. The
                # object may be there whole, or somebody may have cleaned up: uploading again settles it.
                if find_code(error) != "NoSuchUpload":
                    raise
                if is_last_try:
                    raise OutsideError(
                        f"{self.url}/{path}: storage lost an upload in parts twice; run the command again"
                    ) from error
            else:
                return

    def delete(self, path: str) -> None:
        """Remove an object; one that is gone already is fine."""
        with self._explain(path), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._full(path))

    def locate(self, paths: Sequence[str]) -> tuple[Any, Sequence[str]]:
        """Where objects lie for other programs: addresses, and the file system that knows them, None on this disk."""
        if self._is_local:
            return None, [self._full(path) for path in paths]
        protocol = self._fs.protocol if isinstance(self._fs.protocol, str) else self._fs.protocol[0]
        return self._fs, [f"{protocol}://{self._full(path).lstrip('/')}" for path in paths]

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}" if path else str(self._root)

    @contextlib.contextmanager
    def _explain(self, path: str, *, is_write: bool = False) -> Iterator[None]:
        """Turn what storage clients raise into errors that say where and what to do."""
        where = f"{self.url}/{path}"
        try:
            with storage_errors(where):
                yield
        except FileNotFoundError as error:
            if not is_write:
                raise
            raise ConfigError(
                f"{where}: expected storage to write to, found none ({error}); create the bucket or correct the address"
            ) from error


def _list_local(folder: str) -> Iterator[StoredFile]:
    """Files of a folder on disk, a third of what fsspec takes for each: there may be a million."""
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                if entry.is_file():
                    stat = entry.stat()
                    yield StoredFile(name=entry.name, bytes=stat.st_size, modified=stat.st_mtime)


def _build_stored_file(entry: dict[str, Any]) -> StoredFile:
    names = ("mtime", "LastModified", "last_modified", "updated", "created")
    modified = next((entry[name] for name in names if entry.get(name) is not None), None)
    return StoredFile(
        name=str(entry["name"]).rsplit("/", 1)[-1], bytes=int(entry["size"] or 0), modified=_parse_time(modified)
    )


def _parse_time(value: object) -> float | None:
    """Seconds since the epoch; None where a file system gives something that is no time."""
    if isinstance(value, str):
        try:
            value = datetime.datetime.fromisoformat(value)
        except ValueError:
            return None
    if isinstance(value, datetime.datetime):
        return value.timestamp()
    return float(value) if isinstance(value, int | float) else None


def _means_exists(error: Exception) -> bool:
    """Whether a failed create says that the name is taken (or, on some servers, that it may be)."""
    if isinstance(error, FileExistsError) or type(error).__name__ == "ResourceExistsError":
        return True
    said = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")
    return find_code(error) in said or find_status(error) in (409, 412)


def _means_past_end(error: Exception) -> bool:
    """Whether a failed read says that the range holds no byte of the object; files on disk are read as empty there."""
    return find_code(error) in ("InvalidRange", "416") or find_status(error) == 416
