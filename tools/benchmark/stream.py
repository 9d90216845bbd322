"""`logitstore benchmark stream`: how fast records reach a student, beside other projects' streams of the same ones."""

from __future__ import annotations

import contextlib
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.benchmark.arguments import check_folder
from tools.benchmark.tables import print_heading, print_table, print_text

if TYPE_CHECKING:
    from logitstore.records import Record

_TOP_KS = [32, 64]
_SEQUENCES = 100_000_000
_RECORDS_PER_ROW_GROUP = (16, 32, 128)
_ORDER_REPEATS = 3
_WORLD_SIZES = (1, 8, 64)
_RANK_EPOCHS = 3
_BATCHES = (64, 256, 512)
_SOURCES = 8
_SIMULATED = {"row_groups": 20_000, "records_per_row_group": 16, "batch": 512}


class Part(StrEnum):
    """What is measured."""

    throughput = "throughput"
    order = "order"
    ranks = "ranks"
    shuffle = "shuffle"
    storage = "storage"


def stream(
    part: Annotated[
        list[Part] | None, typer.Option(help="What to measure; may be given again. All by default.")
    ] = None,
    top_k: Annotated[list[int] | None, typer.Option(help="Slots; may be given again. 32 and 64 by default.")] = None,
    records: Annotated[
        int, typer.Option(min=64, help="Records of 1,024 positions at 64 slots; more where there are fewer slots.")
    ] = 2048,
    base_records: Annotated[int, typer.Option(min=1, help="True synthetic records that these are varied from.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Records of a global batch.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repetitions of each, in turns.")] = 5,
    peers_python: Annotated[
        Path | None,
        typer.Option(
            help="Interpreter of an environment with mosaicml-streaming and litdata; without it they are left out."
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="A folder that may be written to; what is put there is deleted again."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads that read from that storage.")] = 4,
    folder: Annotated[Path | None, typer.Option(help="An empty folder to work in, instead of a temporary one.")] = None,
) -> None:
    """Stream the same records, shuffled, from a store and from other projects' data sets.

    Every reader delivers batches of flat NumPy columns: ids in int32, logprobs and scalars in float32. Each repetition
    is a process of its own.

    \b
    Example:
      logitstore benchmark stream --peers-python peers/bin/python
      logitstore benchmark stream --part storage --top-k 64 --url s3://bucket/scratch
    """

    parts = part or list(Part)
    if folder is not None:
        check_folder(folder)
    command = f"logitstore benchmark stream --records {records} --batch {batch} --repeats {repeats}"
    print_heading(
        " ".join([command, *(f"--part {name}" for name in part or ()), *(f"--top-k {k}" for k in top_k or ())]),
        "numpy",
        "pyarrow",
        "numba",
        "xxhash",
        "zstandard",
    )
    with contextlib.ExitStack() as stack:
        work = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="logitstore-stream-")))
        if Part.order in parts:
            print_order()
        if Part.shuffle in parts:
            print_shuffle()
        if {*parts} - {Part.order, Part.shuffle}:
            base = build_base(base_records, max(top_k or _TOP_KS))
            for slots in top_k or _TOP_KS:
                num_records = max(1, 64 * records // slots // batch) * batch
                arrays, store = write_records(work / str(slots), base, num_records, slots)
                if Part.throughput in parts:
                    print_throughput(work / str(slots), arrays, store, batch, repeats, peers_python)
                if Part.ranks in parts and slots == max(top_k or _TOP_KS):
                    print_ranks(store)
                if Part.storage in parts and slots == max(top_k or _TOP_KS):
                    print_storage(store, url, batch, repeats, threads)


def build_base(num_records: int, top_k: int) -> list[Record]:
    """Records of the synthetic teacher, seven seconds each."""
    from tools.benchmark.synthetic_teacher import build_synthetic_records

    return list(build_synthetic_records(num_records, top_k))


def write_records(folder: Path, base: list[Record], num_records: int, top_k: int) -> tuple[Path, Path]:
    """A folder with the records as plain arrays, and a store of them."""
    from logitstore.store.files import StoreFiles
    from tools.benchmark.signals import cut_supports
    from tools.benchmark.stream_records import vary_records, write_arrays, write_store

    arrays, store = folder / "arrays", folder / "store"
    write_arrays(arrays, vary_records(cut_supports(base, top_k), num_records), num_records)
    write_store(StoreFiles(str(store)), arrays)
    return arrays, store


def print_throughput(
    work: Path, arrays: Path, store: Path, batch: int, repeats: int, peers_python: Path | None
) -> None:
    """The table of readers of one set of records."""
    import numpy as np

    from logitstore.store.files import StoreFiles
    from tools.benchmark.stream_records import write_store
    from tools.benchmark.stream_throughput import HEADER, STORE_NAME, build_ratio_row, measure_throughput

    num_records, positions = np.load(arrays / "entropy.npy", mmap_mode="r").shape
    slots = np.load(arrays / "support_ids.npy", mmap_mode="r").shape[1] // positions
    float16 = work / "store-float16"
    write_store(StoreFiles(str(float16)), arrays, shard={"codec": {"kind": "float16"}})
    stores = {STORE_NAME: store, f"{STORE_NAME}, codec float16": float16}
    readers = measure_throughput(work, arrays, stores, batch=batch, repeats=repeats, peers_python=peers_python)
    rows = [reader.build_row(num_records) for reader in readers]
    if peers_python is not None:
        rows += [build_ratio_row(ours, readers) for ours in readers if not ours.is_peer]
    else:
        print_text("mosaicml-streaming and litdata: not measured; --peers-python names no environment that has them")
    print_table([f"k = {slots}, {num_records:,} records of {positions:,} positions", *HEADER], rows)


def print_order() -> None:
    """Time and memory of the order of a hundred million sequences."""
    from tools.benchmark.stream_processes import Figure, run_step

    rows = []
    for records_per_row_group in _RECORDS_PER_ROW_GROUP:
        task = {"sequences": _SEQUENCES, "records_per_row_group": records_per_row_group, "batch": 1024}
        runs = [run_step("order", **task) for _ in range(_ORDER_REPEATS)]
        seconds = Figure(values=tuple(run["seconds"] for run in runs))
        peak = max(run["peak_bytes"] for run in runs) / 1e6
        rows.append([f"{records_per_row_group} records per row group", seconds.format(2), f"{peak:,.0f}"])
    print_table([f"order of {_SEQUENCES:,} sequences", "seconds to the first batch", "peak MB"], rows)


def print_shuffle() -> None:
    """Chi-square of the sources in batches, and in runs of batches, beside batches drawn at random."""
    from tools.benchmark.shuffle_quality import STEPS_OF_A_RUN
    from tools.benchmark.stream_processes import run_step

    rows = []
    for batch in _BATCHES:
        found = run_step("shuffle", **(_SIMULATED | {"batch": batch}), sources=_SOURCES)
        rows.append([f"{batch} records", f"{found['batch']:.2f}", f"{found['run']:.2f}"])
    header = ["batch", "chi-square of sources to a random draw's", f"of {STEPS_OF_A_RUN} batches together"]
    print_table(header, rows)


def print_ranks(store: Path) -> None:
    """Row groups that all ranks of a job read, to those that there are: of a store, and of a larger one's order."""
    from tools.benchmark.stream_processes import run_step

    rows = []
    for world_size in _WORLD_SIZES:
        found = run_step("read_all_ranks", folder=str(store), batch=64, world_size=world_size, epochs=_RANK_EPOCHS)
        read = found["read_bytes"] / _RANK_EPOCHS / found["store_bytes"]
        simulated = run_step("share_row_groups", **_SIMULATED, world_size=world_size)
        rows.append([world_size, f"{read:.3f}", f"{simulated['reads'] / _SIMULATED['row_groups']:.3f}"])
    print_table(["ranks", "bytes read to bytes of this store", "the same by the order of 20,000 row groups"], rows)


def print_storage(store: Path, url: str | None, batch: int, repeats: int, threads: int) -> None:
    """A stream beside a bare download, on a storage."""
    import uuid

    from tools.benchmark.stream_storage import copied_store, measure_storage

    if url is None:
        print_text("storage: not measured; --url names none")
        return
    with copied_store(str(store), f"{url.rstrip('/')}/benchmark-{uuid.uuid4().hex}") as copy:
        rates = measure_storage(copy, batch=batch, threads=threads, repeats=repeats)
    rows = [[f"{name}, {threads} threads", rate.format(1)] for name, rate in rates.items()]
    ratio = rates["stream"].median / rates["download"].median
    print_table(["row groups from the storage", "MB/s"], [*rows, ["stream to download", f"{ratio:.2f}"]])
