"""RowGroupCache: row groups and footers of stores on local disk, by what they are.

What the cache promises, and how:

1. *The right bytes.* An entry is a file named by the SHA-256 of its bytes, and is held to it whenever it is read (see
   `shard.digests`). One that does not fit (a flipped bit, a power cut, a file put there by hand) is removed, fetched
   from the store again, and counted; a reader notices nothing but the time. What comes from the store was held to the
   same digest, which the manifest names, before it is kept. So no file in the folder can change a record, whoever
   wrote it, and stores that have bytes in common share them.
2. *Reading goes on.* A folder that is full, read-only, removed underneath or on a file system without locks costs one
   line in the log; from then on what is there is used, and new entries are tried again only now and then.
3. *Many readers.* Threads, processes, ranks and jobs may share a folder. Entries are written under another name and
   renamed, and read without a lock. Whoever needs bytes that another is fetching waits for them for a while and then
   fetches them itself, so the students of a sweep fetch a store once, and a process that was stopped stops nobody.
4. *Not more than `max_bytes`* over all who share the folder, those being written included. Each reader makes room by
   its own limit when it keeps something, so among different limits the smallest rules. What nobody has used since
   this reader began goes first, least recently used first, unless the reader finds that it needs what was there. Of
   what is in use, what was used last goes first but for a window of an eighth: an epoch reads everything once and in
   a new order, so what was just read is missed last. A cache of half of a store so answers 45% of the reads, where one
   that drops the least recently used answers 15%.
5. *No traces.* A killed process leaves at most unfinished files, which count and are removed when room is next made.

Nothing is synced to the disk: after a power cut an entry is whole, or found out by its digest. See `cache_folder` for
the files.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ByteSize, Field

from logitstore.errors import ConfigError
from logitstore.settings import Settings
from logitstore.shard.digests import has_sha256
from logitstore.stream.cache_folder import Claim, claim_entry, get_entry_path, make_room

_LOG = logging.getLogger(__name__)
# Longer than a fetch takes on a storage that is well; after that, two fetch the same.
CLAIM_WAIT_SECONDS = 10.0
# After an entry could not be written: a full disk is not filled again with every row group.
PAUSE_SECONDS = 60.0
# After a wait for another process that makes room: one that is stopped does not hold up every read.
BUSY_PAUSE_SECONDS = 10.0
# Entries are in use that were used while this reader fetched this many times the limit. Fewer than the misses of an
# epoch would make entries idle before their turn comes; with 8 that is so for caches below a ninth of the store.
_GENERATION_LIMITS = 8
# Of the limit: once so much of what was there before has been read, all of that is in use.
_EVIDENCE_FRACTION = 16


class CacheSettings(Settings):
    """A folder on a fast local disk for row groups that were read.

    Attributes:
        folder: made where there is none; several jobs may share it.
        max_bytes: what the cache may hold, such as `200GB`; at least a row group.
    """

    folder: str
    max_bytes: Annotated[ByteSize, Field(gt=0)]

    def build(self) -> RowGroupCache:
        """The cache that these settings describe."""
        return RowGroupCache(self.folder, self.max_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheStatistics:
    """What a cache did for this process; bytes are those of the row groups and footers.

    Attributes:
        hits, hit_bytes: reads that it answered.
        misses, miss_bytes: reads that went to the store.
        healed: entries that were damaged, and were removed.
        evicted: entries that were removed to make room.
        not_kept: misses whose bytes could not be kept.
    """

    hits: int = 0
    hit_bytes: int = 0
    misses: int = 0
    miss_bytes: int = 0
    healed: int = 0
    evicted: int = 0
    not_kept: int = 0


class RowGroupCache:
    """A local cache of verified bytes, for `LogitStore.open(…, cache=…)`; see the module's docstring for its terms.

    Safe to use from several threads and after a fork; pickles to its folder and limit. Creates nothing before the
    first read.

    Args:
        folder: on a local disk; made where there is none.
        max_bytes: what the folder may hold.
    Raises:
        ConfigError: the limit is not positive, the folder is a file, or this system has no POSIX file locks.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder).expanduser().absolute(), int(max_bytes)
        if self.max_bytes <= 0:
            raise ConfigError(f"cache {self.folder}: expected a positive max_bytes, found {self.max_bytes}")
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"cache {self.folder}: expected a folder, found a file; name another folder")
        if os.name != "posix":
            raise ConfigError(f"cache {self.folder}: expected a system with POSIX file locks; leave the cache out")
        self._in_use_since_ns = self._generation_began_ns = time.time_ns()
        self._begin()

    def __getstate__(self) -> dict[str, Any]:
        # With the time, or every worker that a data loader starts anew would take all entries for idle.
        return {"folder": self.folder, "max_bytes": self.max_bytes, "since": self._in_use_since_ns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder, self.max_bytes = state["folder"], state["max_bytes"]
        self._in_use_since_ns = self._generation_began_ns = state["since"]
        self._begin()

    def _begin(self) -> None:
        """What belongs to one process."""
        self._lock = threading.Lock()
        self._process_id = os.getpid()
        self._statistics = CacheStatistics()
        self._generation_bytes = self._earlier_bytes = 0
        self._was_counted = False
        self._paused_until = 0.0
        self._told: set[str] = set()

    @property
    def statistics(self) -> CacheStatistics:
        """Of this process so far."""
        self._count()
        return self._statistics

    def check_holds(self, num_bytes: int, what: str) -> None:
        """Check that something can be kept at all.

        Raises:
            ConfigError: it is larger than the cache.
        """
        if num_bytes > self.max_bytes:
            raise ConfigError(
                f"cache {self.folder}: expected max_bytes of at least {num_bytes}, the size of {what}, found "
                f"{self.max_bytes}; give it room for many row groups, or leave the cache out"
            )

    def read(self, sha256: bytes, num_bytes: int, fetch: Callable[[], bytes]) -> bytes:
        """The bytes of a digest, from the cache or else from `fetch`, and then kept.

        Args:
            sha256, num_bytes: digest and length of the bytes.
            fetch: reads them from where they come from, and has held them to the digest. Its errors pass.
        """
        digest = sha256.hex()
        data = self._read_entry(digest, num_bytes, is_claimed=False)
        if data is not None:
            return data
        claim = self._claim(digest) if num_bytes <= self.max_bytes else None
        if claim is None:
            data = fetch()
            self._count_miss(num_bytes, not_kept=1)
            return data
        with claim:
            data = self._read_entry(digest, num_bytes, is_claimed=True)  # another may have fetched it meanwhile
            if data is None:
                data = fetch()
                self._count_miss(num_bytes, not_kept=int(not self._keep(claim, data)))
        return data

    def _read_entry(self, digest: str, num_bytes: int, *, is_claimed: bool) -> bytes | None:
        """An entry's bytes, None where there are none or other ones; those are removed by who has claimed the entry."""
        path = get_entry_path(self.folder, digest)
        try:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                data = file.read() if stat.st_size == num_bytes else b""
            if len(data) == num_bytes and has_sha256(data, bytes.fromhex(digest)):
                self._note_hit(path, num_bytes, stat.st_mtime_ns)
                return data
            found = f"{stat.st_size} bytes" if stat.st_size != num_bytes else "bytes of another digest"
        except FileNotFoundError:
            return None
        except OSError as error:
            found = f"a file that cannot be read ({error.strerror})"
        if is_claimed:
            self._remove_damaged(path, f"expected the {num_bytes} bytes of its name, found {found}")
        return None

    def _note_hit(self, path: Path, num_bytes: int, used_ns: int) -> None:
        now = time.time_ns()
        with contextlib.suppress(OSError):  # evicted meanwhile, or of another user, who alone may set it
            os.utime(path, ns=(now, now))
        self._count(hits=1, hit_bytes=num_bytes)
        with self._lock:
            if used_ns < self._in_use_since_ns:
                self._earlier_bytes += num_bytes
                if self._earlier_bytes > self.max_bytes // _EVIDENCE_FRACTION:
                    self._in_use_since_ns = 0

    def _remove_damaged(self, path: Path, why: str) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._tell("damaged", f"{path}: {why}; it cannot be removed ({error.strerror}): read from the store")
            return
        self._count(healed=1)
        self._tell("damaged", f"{path}: {why}; removed, and read from the store again")

    def _claim(self, digest: str) -> Claim | None:
        if time.monotonic() < self._paused_until:
            return None
        try:
            return claim_entry(self.folder, digest, CLAIM_WAIT_SECONDS)
        except OSError as error:
            self._pause(error)
            return None

    def _keep(self, claim: Claim, data: bytes) -> bool:
        try:
            room = make_room(
                self.folder,
                claim,
                len(data),
                self.max_bytes,
                used_since_ns=self._in_use_since_ns,
                should_count=not self._was_counted,  # the sum is not synced, and others may have removed files
            )
            self._was_counted = True
            self._count(evicted=room.num_evicted)
            if room.is_there:
                claim.publish(data)
        except OSError as error:
            self._pause(error)
            return False
        return room.is_there

    def _pause(self, error: OSError) -> None:
        """Keep nothing for a while; not so for a folder that was just removed, which the next read makes again."""
        if error.errno != errno.ENOENT:
            seconds = BUSY_PAUSE_SECONDS if isinstance(error, TimeoutError) else PAUSE_SECONDS
            self._paused_until = time.monotonic() + seconds
        self._tell("unusable", f"cache {self.folder}: cannot be written to ({error}): read from the store")

    def _tell(self, kind: str, message: str) -> None:
        """Log the first of a kind as a warning."""
        _LOG.log(logging.DEBUG if kind in self._told else logging.WARNING, "%s", message)
        self._told.add(kind)

    def _count_miss(self, num_bytes: int, *, not_kept: int) -> None:
        self._count(misses=1, miss_bytes=num_bytes, not_kept=not_kept)
        with self._lock:
            self._generation_bytes += num_bytes
            if self._generation_bytes > _GENERATION_LIMITS * self.max_bytes:
                self._in_use_since_ns, self._generation_began_ns = self._generation_began_ns, time.time_ns()
                self._generation_bytes = self._earlier_bytes = 0

    def _count(self, **added: int) -> None:
        if os.getpid() != self._process_id:  # after a fork: another thread may have held the lock
            self._begin()
        with self._lock:
            values = {name: getattr(self._statistics, name) + number for name, number in added.items()}
            self._statistics = replace(self._statistics, **values)
