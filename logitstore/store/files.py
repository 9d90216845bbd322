"""The few object operations that a store needs, over any fsspec file system.

Nothing but `create` may be relied on when two writers race: it is the only operation that promises "one of us wins".
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from logitstore.errors import ConfigError, IncompatibleStoreError, OutsideError

# Small objects are bound by round trips: 16 in flight read 1,500 commits a second from a near object store.
PARALLEL_READS = 16


@dataclass(frozen=True, kw_only=True)
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
    """

    def __init__(self, url: str, storage_options: dict[str, Any] | None = None) -> None:
        self.url = url.rstrip("/")
        self.storage_options = dict(storage_options or {})
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, **self.storage_options)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"{url}: expected a URL that fsspec can open, found {error}") from None
        self._is_local = isinstance(self._fs, LocalFileSystem)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreFiles, (self.url, self.storage_options)

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of an object, or all of it.

        Raises:
            FileNotFoundError: there is no such object.
            OutsideError: the storage failed.
        """
        with self._explain(path):
            data: bytes = self._fs.cat_file(self._full(path), start=start, end=stop)
            return data

    def read_many(self, paths: Sequence[str]) -> Iterator[bytes]:
        """Whole objects in the order asked for, several requests in flight."""
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            for start in range(0, len(paths), 1024):  # bounds what is read ahead of a slow consumer
                yield from pool.map(self.read, paths[start : start + 1024])

    def exists(self, path: str) -> bool:
        with self._explain(path):
            self._fs.invalidate_cache()
            return bool(self._fs.exists(self._full(path)))

    def list(self, folder: str) -> list[StoredFile]:
        """Objects directly in a folder, by name; empty where there is no such folder."""
        with self._explain(folder):
            self._fs.invalidate_cache()
            try:
                entries = self._fs.ls(self._full(folder), detail=True)
            except FileNotFoundError:
                return []
        files = [_build_stored_file(entry) for entry in entries if entry["type"] == "file"]
        return sorted((file for file in files if not file.name.startswith(".")), key=lambda file: file.name)

    def create(self, path: str, data: bytes) -> bool:
        """Store a small object only if nothing has that name.

        Returns False when something seems to be there. That answer is ambiguous on object stores: a response lost on
        the way makes the client try again and find its own object, so the caller reads back before it believes it.
        """
        with self._explain(path):
            try:
                if self._is_local:
                    return self._create_local(path, data)
                self._fs.pipe_file(self._full(path), data, mode="create")
                return True
            except OSError as error:
                if _means_exists(error):
                    return False
                raise

    def put(self, path: str, data: bytes) -> None:
        """Store an object under a name nobody else uses, replacing what an earlier try left there."""
        with self._explain(path):
            if self._is_local:
                self._write_local(path, data, os.replace)
            else:
                self._fs.pipe_file(self._full(path), data)

    def put_file(self, path: str, source: Path) -> None:
        """Upload a local file (in parts where the storage wants that); same terms as `put`."""
        with self._explain(path):
            if self._is_local:
                self._write_local(path, source, os.replace)
            else:
                self._fs.put_file(str(source), self._full(path))

    def delete(self, path: str) -> None:
        """Remove an object; one that is gone already is fine."""
        with self._explain(path), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._full(path))

    def check_create_only(self) -> None:
        """Prove that this storage keeps its promise of create-only objects, by breaking it once on purpose.

        Raises:
            IncompatibleStoreError: a second create on one name was accepted.
        """
        path = f"probe/{uuid.uuid4().hex}"
        self.create(path, b"1")
        try:
            if self.create(path, b"2"):
                raise IncompatibleStoreError(
                    f"{self.url}: expected a second create-only put on one name to fail, found it accepted; two "
                    "captures at once could damage this store. Use other storage, or set single_writer: true and "
                    "never run two captures into it"
                )
        finally:
            self.delete(path)

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}" if path else str(self._root)

    def _create_local(self, path: str, data: bytes) -> bool:
        try:
            self._write_local(path, data, os.link)
        except FileExistsError:
            return False
        return True

    def _write_local(self, path: str, data: bytes | Path, publish: Any) -> None:
        """Write beside the target, then publish: a kill leaves either nothing under the name or all of it."""
        target = Path(self._full(path))
        target.parent.mkdir(parents=True, exist_ok=True)
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
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _explain(self, path: str) -> Iterator[None]:
        """Turn what storage clients raise into errors that say where and what to do."""
        where = f"{self.url}/{path}"
        try:
            yield
        except (FileNotFoundError, IncompatibleStoreError, OutsideError, ConfigError):
            raise
        except PermissionError as error:
            raise ConfigError(f"{where}: access denied ({error}); check the credentials of this storage") from error
        except OSError as error:
            raise OutsideError(f"{where}: storage failed with {error!r}; run the command again") from error


def _build_stored_file(entry: dict[str, Any]) -> StoredFile:
    modified = next((entry[key] for key in ("mtime", "LastModified", "created") if entry.get(key) is not None), None)
    if modified is not None and not isinstance(modified, int | float):
        modified = modified.timestamp()
    return StoredFile(name=str(entry["name"]).rsplit("/", 1)[-1], bytes=int(entry["size"] or 0), modified=modified)


def _means_exists(error: OSError) -> bool:
    """Whether a failed create says that the name is taken (or, on some servers, that it may be)."""
    if isinstance(error, FileExistsError):
        return True
    response = getattr(error.__cause__, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return code in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")
