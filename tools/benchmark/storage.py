"""`logitstore benchmark storage`: what a storage gives the project's client, and what obstore gets out of it."""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.benchmark.tables import print_heading, print_table

if TYPE_CHECKING:
    from logitstore.store.files import StoreFiles

    Client = dict[str, Callable[[], object]]

_SMALL_BYTES, _NUM_SMALL, _AT_ONCE = 2_000, 256, 16  # a commit record is about as large
_RANGES_IN_A_ROW = 8


@dataclass(frozen=True, kw_only=True)
class Access:
    """One way of using a storage: its row in the table, and what one repetition moves, or how often it asks."""

    name: str
    bytes: int = 0
    requests: int = 0


def storage(
    url: Annotated[str, typer.Option(help="A folder that may be written to; what is put there is deleted again.")],
    megabytes: Annotated[int, typer.Option(min=1, help="Size of the shard that is put and read, in MiB.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repetitions of each, in turns.")] = 7,
) -> None:
    """Time uploads, whole reads, range reads and small reads on a storage of yours.

    Beside the client of fsspec, which the project uses, obstore does the same in turns, if it is installed; it takes
    its credentials from the environment only.

    \b
    Example:
      logitstore benchmark storage --url s3://bucket/scratch
    """
    from logitstore.store.files import StoreFiles

    files = StoreFiles(f"{url.rstrip('/')}/benchmark-{uuid.uuid4().hex}")
    command = f"logitstore benchmark storage --megabytes {megabytes} --repeats {repeats}"
    print_heading(command, "fsspec", "s3fs", "gcsfs", "adlfs", "obstore")
    with tempfile.TemporaryDirectory(prefix="logitstore-storage-") as folder:
        shard = Path(folder) / "shard"
        shard.write_bytes(os.urandom(megabytes << 20))
        with _cleaned_up(files):
            _measure(files, shard, repeats)


@contextlib.contextmanager
def _cleaned_up(files: StoreFiles) -> Iterator[None]:
    try:
        yield
    finally:
        paths = [f"{folder}/{file.name}" for folder in ("data", "small") for file in files.list(folder)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(files.delete, paths))


def _measure(files: StoreFiles, shard: Path, repeats: int) -> None:
    from tools.benchmark.timing import Timing, time_in_turns

    size = shard.stat().st_size
    files.put_file("data/shard", shard)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda number: files.put(f"small/{number}", bytes(_SMALL_BYTES)), range(_NUM_SMALL)))
    accesses = [
        Access(name=f"put {size >> 20} MiB", bytes=size),
        Access(name=f"get {size >> 20} MiB", bytes=size),
        *(Access(name=f"range of {part >> 20} MiB", bytes=part * _RANGES_IN_A_ROW) for part in _build_parts(size)),
        Access(name="range of 64 KiB", requests=_RANGES_IN_A_ROW),
        Access(name=f"{_AT_ONCE} small reads at once", requests=_NUM_SMALL),
    ]
    clients = {"fsspec": _build_fsspec_client(files, shard)}
    if (client := _build_obstore_client(files.url, shard)) is not None:
        clients["obstore"] = client

    def describe(access: Access, timing: Timing) -> str:
        if access.bytes:
            value, unit = access.bytes / 1e6 / timing.median, "MB/s"
        elif access.requests == _NUM_SMALL:
            value, unit = access.requests / timing.median, "reads/s"
        else:
            value, unit = 1000 * timing.median / access.requests, "ms"
        return f"{value:,.{0 if value >= 100 else 1}f} {unit} ±{50 * timing.spread:.0f}%"

    rows = []
    for access in accesses:
        timings = time_in_turns({name: client[access.name] for name, client in clients.items()}, repeats)
        rows.append([access.name, *(describe(access, timing) for timing in timings.values())])
    print_table(["access", *clients], rows)


def _build_parts(size: int) -> list[int]:
    """Sizes of ranges as readers of row groups ask for them, those that fit into the shard."""
    return [part for part in (1 << 20, 8 << 20) if part <= size]


def _build_ranges(size: int, part: int) -> list[tuple[int, int]]:
    """Ranges spread over the shard, none beginning where another did."""
    step = (size - part) // max(1, _RANGES_IN_A_ROW - 1)
    return [(number * step, number * step + part) for number in range(_RANGES_IN_A_ROW)]


def _build_fsspec_client(files: StoreFiles, shard: Path) -> Client:
    size = shard.stat().st_size

    def read_ranges(part: int) -> Callable[[], object]:
        return lambda: [files.read("data/shard", start, stop) for start, stop in _build_ranges(size, part)]

    small = [f"small/{number}" for number in range(_NUM_SMALL)]
    return {
        f"put {size >> 20} MiB": lambda: files.put_file("data/again", shard),
        f"get {size >> 20} MiB": lambda: files.read("data/shard"),
        **{f"range of {part >> 20} MiB": read_ranges(part) for part in _build_parts(size)},
        "range of 64 KiB": read_ranges(64 << 10),
        f"{_AT_ONCE} small reads at once": lambda: list(files.read_many(small)),
    }


def _build_obstore_client(url: str, shard: Path) -> Client | None:
    """The same accesses through obstore; None where it is not installed."""
    try:
        from_url = importlib.import_module("obstore.store").from_url  # typed only where it is installed
    except ModuleNotFoundError:
        return None
    target = url if "://" in url else Path(url).absolute().as_uri()
    options = {"client_options": {"allow_http": True}} if not target.startswith("file:") else {"mkdir": True}
    store = from_url(target, **options)
    size = shard.stat().st_size

    def read_ranges(part: int) -> Callable[[], object]:
        return lambda: [
            bytes(store.get_range("data/shard", start=start, end=stop)) for start, stop in _build_ranges(size, part)
        ]

    def read_small() -> object:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(lambda number: bytes(store.get(f"small/{number}").bytes()), range(_NUM_SMALL)))

    return {
        f"put {size >> 20} MiB": lambda: store.put("data/again", shard),
        f"get {size >> 20} MiB": lambda: bytes(store.get("data/shard").bytes()),
        **{f"range of {part >> 20} MiB": read_ranges(part) for part in _build_parts(size)},
        "range of 64 KiB": read_ranges(64 << 10),
        f"{_AT_ONCE} small reads at once": read_small,
    }
