"""Whole captures over a wire that breaks: whatever happens at whichever request, it is the old store or the new one."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from fault_proxy import Fault, FaultProxy, Rule
from made_up import VOCAB_SIZE, build_plan, build_records, put_shard
from tiny_models import save_model

from logitstore.capture import UnitCapture
from logitstore.corpus.documents import CorpusSettings
from logitstore.corpus.sequences import SequenceSettings
from logitstore.errors import OutsideError, StoreNotFoundError
from logitstore.planning import CaptureSettings
from logitstore.planning import build_plan as build_capture_plan
from logitstore.store.commit import COMMITS, Outcome, commit_unit, list_units
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import list_manifests, write_manifest
from logitstore.store.plan import create_plan
from logitstore.store.verify import verify_store
from logitstore.teacher.loading import load_teacher
from logitstore.teacher.protocol import TeacherSettings, TopKMethod

NUM_UNITS = 2


def capture_all(files: StoreFiles, folder: Path, attempt: str) -> None:
    """What a capture does, in its order of operations."""
    plan = create_plan(files, build_plan(NUM_UNITS))
    for unit in range(NUM_UNITS):
        if unit not in list_units(files, COMMITS):
            records = build_records(4, unit=unit, vocab_size=VOCAB_SIZE)
            commit = put_shard(files, plan, unit, records, attempt, folder)
            if commit_unit(files, commit) is Outcome.LOST and commit.file:
                files.delete(commit.file)
    write_manifest(files, plan.compute_fingerprint())


def check_old_or_new(url: str) -> None:
    """What is there is sound, and a manifest is there only with every unit."""
    files = StoreFiles(url)
    try:
        problems = verify_store(files).problems
    except StoreNotFoundError:
        assert files.list("") == []
        return
    missing = "manifest-*.parquet"  # of a capture whose last write is still to come
    assert [problem for problem in problems if problem.path != missing] == []
    if list_manifests(files):
        assert len(LogitStore.open(url)) == NUM_UNITS * 4


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["reset", "refuse_after"])
def test_outage_from_any_request_on_leaves_a_store_that_a_rerun_completes(
    hasty_wire: StoreFiles, proxy: FaultProxy, tmp_path: Path, fault: Fault
) -> None:
    for first in range(0, 100, 3):
        url = f"{hasty_wire.url}-{first}"
        files = StoreFiles(url, hasty_wire.storage_options)
        proxy.set(Rule(fault=fault, skip=first, status=500, code="InternalError"))
        with contextlib.suppress(OutsideError):
            capture_all(files, tmp_path, "first")
            assert first > 10
            return
        proxy.set()
        check_old_or_new(url)
        capture_all(files, tmp_path, "second")
        check_old_or_new(url)
        assert len(LogitStore.open(url)) == NUM_UNITS * 4
    pytest.fail("the capture never finished")


@pytest.mark.slow
def test_units_captured_from_a_corpus_behind_the_same_wire_are_those_of_a_sound_one(
    wire: StoreFiles, proxy: FaultProxy, tmp_path: Path
) -> None:
    for number in range(3):
        wire.put(f"corpus/{number}.txt", f"{number}: all happy families are alike. ".encode() * 40)
    settings = CaptureSettings(
        store=wire.url,
        corpus=CorpusSettings(files=[f"{wire.url}/corpus/*.txt"]),
        teacher=TeacherSettings(model=str(save_model("llama", tmp_path)), device="cpu"),
        method=TopKMethod(k=4),
        sequences=SequenceSettings(length=32),
        unit_bytes=1000,
        storage_options=wire.storage_options,
    )
    teacher = load_teacher(settings.teacher, settings.method)
    faults: tuple[Fault, ...] = ("refuse", "refuse_after", "reset", "lose_response", "truncate")
    rules = [Rule(fault=fault, probability=0.05, status=500, code="InternalError") for fault in faults]
    proxy.set(*rules)
    plan = create_plan(wire, build_capture_plan(settings, teacher.identity))
    capture = UnitCapture(wire, plan, teacher, settings.corpus, storage_options=settings.storage_options)
    num_units = len(plan.build_unit_table())
    receipts = [capture.capture(unit) for unit in range(num_units)]
    write_manifest(wire, plan.compute_fingerprint())
    assert sum(rule.hits for rule in rules) > 5
    proxy.set()
    assert num_units > 2
    assert [receipt.outcome for receipt in receipts] == [Outcome.WON] * num_units
    assert verify_store(wire).problems == ()
    assert LogitStore.open(wire.url).compute_statistics().recorded_documents == 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_capture_over_a_wire_that_fails_at_random_ends_as_on_a_sound_one(
    wire: StoreFiles, proxy: FaultProxy, tmp_path: Path, seed: int
) -> None:
    faults: tuple[Fault, ...] = ("refuse", "refuse_after", "reset", "lose_response", "truncate")
    rules = [Rule(fault=fault, probability=0.12, status=500, code="InternalError") for fault in faults]
    proxy.set(*rules, seed=seed)
    for attempt in ("first", "second", "third"):  # as exit code 4 asks for
        with contextlib.suppress(OutsideError):
            capture_all(wire, tmp_path, attempt)
            break
    assert sum(rule.hits for rule in rules) > 2
    proxy.set()
    assert verify_store(wire).problems == ()
    assert list_manifests(wire) == [1]
    assert len(LogitStore.open(wire.url)) == NUM_UNITS * 4
