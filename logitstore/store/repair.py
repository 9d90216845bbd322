"""Mend a store after a verification: take damaged units back, so that the next capture does them again."""

from __future__ import annotations

from logitstore.store.commit import COMMITS, build_commit_path, list_unit_files
from logitstore.store.files import StoreFiles
from logitstore.store.manifest import build_manifest_path, write_manifest
from logitstore.store.plan import check_units_are_planned, read_plan
from logitstore.store.verify import Verification


def repair_store(files: StoreFiles, verification: Verification) -> list[int]:
    """Write a manifest without the damaged units, then delete their commits and the manifests that nobody can read.

    In this order: killed in between, a repair leaves readers with whole records only, and units that are still known
    as damaged to the next verification. Shards are left to garbage collection, and stay while an older manifest names
    them.

    Returns the units that have to be captured again.

    Raises:
        IncompatibleStoreError: a program with another format version has written to the store, or a part of its plan is
            missing; nothing is changed.
        OutsideError: the storage failed; run the repair again.
    """
    damaged = sorted({problem.unit for problem in verification.problems if problem.unit is not None})
    units = list_unit_files(files, COMMITS).units
    plan = read_plan(files)
    check_units_are_planned(files.url, plan, units)
    write_manifest(files, plan.compute_fingerprint(), rebuild=True, without=damaged)
    for unit in damaged:
        files.delete(build_commit_path(unit))
    for problem in verification.problems:
        if problem.damaged_manifest is not None:
            files.delete(build_manifest_path(problem.damaged_manifest))
    return damaged
