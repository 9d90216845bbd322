"""The steps of `logitstore benchmark scale`, each run in a process of its own: `python -m tools.benchmark.scale_steps`.

Prints one JSON object: seconds and processor seconds of the step without what it needs beforehand, peak memory of the
whole process, and what came out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from tools.benchmark.own_process import print_measured

# A step prepares and returns what is measured; that returns what to say of its outcome.
Step = Callable[[str, int], Callable[[], str]]


def nothing(folder: str, num_units: int) -> Callable[[], str]:
    """Import what every step imports."""
    import logitstore.store.logit_store  # noqa: F401

    return lambda: ""


def plan(folder: str, num_units: int) -> Callable[[], str]:
    """Cut a corpus into units and create plan.json."""
    from logitstore.corpus.files import CorpusSettings
    from logitstore.corpus.measuring import build_unit_table
    from logitstore.store.files import StoreFiles
    from logitstore.store.plan import PLAN_PATH, create_plan
    from tools.benchmark.simulated_store import UNIT_BYTES, build_corpus_files, build_simulated_plan

    corpus_files = build_corpus_files(num_units)

    def measure() -> str:
        units = build_unit_table(corpus_files, UNIT_BYTES, CorpusSettings(files=["simulated"]))
        create_plan(StoreFiles(folder), build_simulated_plan(corpus_files, units))
        size = Path(folder, PLAN_PATH).stat().st_size
        return f"{len(corpus_files):,} corpus files; plan.json {size / 2**20:.1f} MiB"

    return measure


def read_the_plan(folder: str, num_units: int) -> Callable[[], str]:
    """Read plan.json, with its fingerprint and its unit table."""
    from logitstore.store.files import StoreFiles
    from logitstore.store.plan import read_plan

    def measure() -> str:
        found = read_plan(StoreFiles(folder))
        return f"{len(found.build_unit_table()):,} units, plan {found.compute_fingerprint()[:8]}"

    return measure


def list_to_do(folder: str, num_units: int) -> Callable[[], str]:
    """List commits and quarantine of a folder on disk, and take the difference to the plan."""
    from cluster.report import read_standing
    from logitstore.store.files import StoreFiles
    from logitstore.store.plan import read_plan

    files = StoreFiles(folder)
    found = read_plan(files)

    def measure() -> str:
        standing = read_standing(files, found)
        to_do = standing.list_to_do(retry_quarantined=False)
        return f"{len(standing.committed):,} committed, {len(to_do):,} left"

    return measure


def list_bucket(folder: str, num_units: int) -> Callable[[], str]:
    """List commits from entries as s3fs gives them."""
    import fsspec

    from logitstore.store.commit import COMMITS, list_units
    from logitstore.store.files import StoreFiles
    from tools.benchmark.simulated_store import SimulatedBucket

    fsspec.register_implementation("simulated-bucket", SimulatedBucket)
    files = StoreFiles("simulated-bucket://bucket/store", {"num_units": num_units})
    return lambda: f"{len(list_units(files, COMMITS)):,} committed, no network"


def write_the_manifest(folder: str, num_units: int) -> Callable[[], str]:
    """Write a manifest of what is committed."""
    from logitstore.store.files import StoreFiles
    from logitstore.store.manifest import build_manifest_path, write_manifest
    from logitstore.store.plan import read_plan

    files = StoreFiles(folder)
    fingerprint = read_plan(files).compute_fingerprint()

    def measure() -> str:
        manifest = write_manifest(files, fingerprint)
        size = Path(folder, build_manifest_path(manifest.number or 0)).stat().st_size
        return f"manifest {manifest.number}: {len(manifest.units):,} units, {size / 2**20:,.0f} MiB"

    return measure


def open_the_store(folder: str, num_units: int) -> Callable[[], str]:
    """Open a store at its newest manifest."""
    from logitstore.store.logit_store import LogitStore

    def measure() -> str:
        store = LogitStore.open(folder)
        return f"{len(store):,} records in {store.num_row_groups:,} row groups"

    return measure


def order(folder: str, num_units: int) -> Callable[[], str]:
    """Order an epoch of an open store and find the records of its first batch."""
    from logitstore.store.logit_store import LogitStore
    from logitstore.stream.order import StreamOrder

    store = LogitStore.open(folder)

    def measure() -> str:
        batch = StreamOrder(store.row_group_records, global_batch_sequences=256, seed=0).compute_batch(0)
        return f"{len(batch)} records of {len(set(batch.row_groups.tolist()))} row groups"

    return measure


def sum_statistics(folder: str, num_units: int) -> Callable[[], str]:
    """Sums over an open store."""
    from logitstore.store.logit_store import LogitStore

    store = LogitStore.open(folder)
    return lambda: f"{store.compute_statistics().positions:,} positions"


def find_the_garbage(folder: str, num_units: int) -> Callable[[], str]:
    """What a garbage collection would delete."""
    from logitstore.store.files import StoreFiles
    from logitstore.store.garbage import find_garbage

    def measure() -> str:
        return f"{len(find_garbage(StoreFiles(folder))):,} files of {num_units:,}"

    return measure


def verify_quickly(folder: str, num_units: int) -> Callable[[], str]:
    """Check commits, sizes and manifests."""
    from logitstore.store.files import StoreFiles
    from logitstore.store.verify import verify_store

    def measure() -> str:
        found = verify_store(StoreFiles(folder), quick=True)
        return f"{found.units:,} units, {len(found.problems)} problems"

    return measure


STEPS: dict[str, Step] = {
    step.__name__: step
    for step in (
        nothing,
        plan,
        read_the_plan,
        list_to_do,
        list_bucket,
        write_the_manifest,
        open_the_store,
        order,
        sum_statistics,
        find_the_garbage,
        verify_quickly,
    )
}


def main(name: str, folder: str, num_units: str) -> None:
    """Run one step and print what was measured."""
    print_measured(STEPS[name](folder, int(num_units)))


if __name__ == "__main__":
    main(*sys.argv[1:])
