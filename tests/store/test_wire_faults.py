"""A real S3 server behind a wire that breaks: what single operations, commits and readers make of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fault_proxy import Fault, FaultProxy, Rule
from made_up import VOCAB_SIZE, build_plan, build_records, put_shard

from logitstore.errors import ConfigError, CorruptShardError, IncompatibleStoreError, OutsideError
from logitstore.store.commit import Commit, Outcome, build_commit_path, commit_unit, read_commit
from logitstore.store.create_only import check_create_only, create_or_read_back
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import list_manifests, read_manifest, write_manifest
from logitstore.store.plan import create_plan, read_plan
from logitstore.store.verify import verify_store

BuildStore = Callable[..., LogitStore]
OPERATIONS: dict[str, Callable[[StoreFiles, Path], object]] = {
    "read": lambda files, _: files.read("data/x"),
    "range": lambda files, _: files.read("data/x", 2, 5),
    "read many": lambda files, _: list(files.read_many(["data/x", "data/x"])),
    "exists": lambda files, _: (files.exists("data/x"), files.exists("data/gone")),
    "list": lambda files, _: [file.name for file in files.list("data")],
    "put": lambda files, _: (files.put("data/y", b"y"), files.read("data/y")),
    "upload": lambda files, source: (files.put_file("data/z", source), files.read("data/z")),
    "create": lambda files, _: (create_or_read_back(files, "new", b"n"), files.read("new")),
    "delete": lambda files, _: (files.delete("data/x"), files.exists("data/x")),
}
EXPECTED = {
    "read": b"0123456789",
    "range": b"234",
    "read many": [b"0123456789", b"0123456789"],
    "exists": (True, False),
    "list": ["x"],
    "put": (None, b"y"),
    "upload": (None, b"source"),
    "create": (True, b"n"),
    "delete": (None, False),
}
BURSTS = {
    "503 SlowDown": Rule(fault="refuse", times=3),
    "500": Rule(fault="refuse", status=500, code="InternalError", times=3),
    "500 after the act": Rule(fault="refuse_after", status=500, code="InternalError", times=3),
    "reset before": Rule(fault="reset", times=3),
    "answer lost": Rule(fault="lose_response", times=3),
    "body cut short": Rule(fault="truncate", method="GET", times=1),
}


def build_rule(of: Rule) -> Rule:
    """The same rule, not used yet."""
    return Rule(
        fault=of.fault, method=of.method, path=of.path, times=of.times, skip=of.skip, status=of.status, code=of.code
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_in_a_burst_of_faults_does_what_it_says(
    wire: StoreFiles, proxy: FaultProxy, tmp_path: Path, name: str
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"source")
    for burst, rule in BURSTS.items():
        proxy.set()
        wire.put("data/x", b"0123456789")
        wire.delete("new")
        wire.delete("data/y")
        wire.delete("data/z")
        proxy.set(build_rule(rule))
        assert OPERATIONS[name](wire, source) == EXPECTED[name], burst
        has_body = name not in ("exists", "list", "delete")  # those are answered in the head, or read their body once
        assert proxy.rules[0].hits == rule.times or (burst == "body cut short" and not has_body), burst


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_outage_ends_in_an_error_that_names_the_object_and_asks_for_a_rerun(
    hasty_wire: StoreFiles, proxy: FaultProxy, tmp_path: Path, name: str
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"source")
    outages: tuple[Fault, ...] = ("reset", "refuse")
    for fault in outages:
        proxy.set(Rule(fault=fault))
        with pytest.raises(OutsideError, match=rf"{hasty_wire.url}/(data|new).*run the command again") as raised:
            OPERATIONS[name](hasty_wire, source)
        assert raised.value.exit_code == 4
        proxy.set()
        assert not hasty_wire.exists("new")


def put(files: StoreFiles, attempt: str, folder: Path, seed: int = 0) -> Commit:
    records = build_records(4, vocab_size=VOCAB_SIZE, seed=seed)
    return put_shard(files, read_plan(files), 0, records, attempt, folder)


AMBIGUOUS = {
    "answer lost, client tries again": Rule(fault="lose_response", method="PUT", path="commits", times=1),
    "409 with our commit stored": Rule(
        fault="refuse_after", status=409, code="ConditionalRequestConflict", method="PUT", path="commits", times=1
    ),
    "409 with nothing stored": Rule(
        fault="refuse", status=409, code="ConditionalRequestConflict", method="PUT", path="commits", times=2
    ),
    "500 with our commit stored": Rule(
        fault="refuse_after", status=500, code="InternalError", method="PUT", path="commits", times=1
    ),
    "reset": Rule(fault="reset", method="PUT", path="commits", times=1),
    "hang": Rule(fault="hang", method="PUT", path="commits", times=1),
}


@pytest.mark.parametrize("is_client_patient", [True, False], ids=["client tries again", "client gives up"])
@pytest.mark.parametrize("fault", AMBIGUOUS)
def test_commit_over_a_bad_wire_is_ours_unless_another_was_first(
    hasty_wire: StoreFiles, proxy: FaultProxy, tmp_path: Path, fault: str, is_client_patient: bool
) -> None:
    config = {} if is_client_patient else dict(hasty_wire.storage_options["config_kwargs"])
    if fault == "hang":
        config["read_timeout"] = 0.5
    files = StoreFiles(hasty_wire.url, hasty_wire.storage_options | {"config_kwargs": config})
    create_plan(files, build_plan(1))
    ours, later = put(files, "ours", tmp_path), put(files, "later", tmp_path, seed=1)
    proxy.set(build_rule(AMBIGUOUS[fault]))
    assert commit_unit(files, ours) is Outcome.WON
    assert proxy.rules[0].hits == proxy.rules[0].times
    proxy.set(build_rule(AMBIGUOUS[fault]))
    assert commit_unit(files, later) is Outcome.LOST
    assert read_commit(files, 0).attempt == "ours"


def test_commit_that_never_arrives_leaves_the_old_store(
    hasty_wire: StoreFiles, proxy: FaultProxy, tmp_path: Path
) -> None:
    create_plan(hasty_wire, build_plan(1))
    commit = put(hasty_wire, "ours", tmp_path)
    proxy.set(Rule(fault="refuse", method="PUT", path="commits"))
    with pytest.raises(OutsideError, match=r"commits/0000000\.json"):
        commit_unit(hasty_wire, commit)
    proxy.set()
    assert not hasty_wire.exists(build_commit_path(0))
    assert commit_unit(hasty_wire, commit) is Outcome.WON


@pytest.mark.parametrize("fault", ["lose_response", "refuse_after", "refuse", "reset"])
def test_manifest_over_a_bad_wire_is_written_once(
    wire: StoreFiles, proxy: FaultProxy, tmp_path: Path, fault: Fault
) -> None:
    plan = create_plan(wire, build_plan(1))
    commit_unit(wire, put(wire, "ours", tmp_path))
    rule = Rule(fault=fault, method="PUT", path="manifest", times=1, status=409, code="ConditionalRequestConflict")
    proxy.set(rule)
    assert write_manifest(wire, plan.compute_fingerprint()).number == 1
    assert rule.hits == 1
    assert list_manifests(wire) == [1]
    assert verify_store(wire).problems == ()


def open_behind(store: LogitStore, proxy: FaultProxy) -> LogitStore:
    return LogitStore.open(store.url, storage_options={"endpoint_url": proxy.endpoint_url}, retry_waits_seconds=(0.0,))


@pytest.mark.parametrize("fault", ["corrupt", "truncate", "refuse", "reset", "lose_response"])
@pytest.mark.parametrize("part", [0, 1], ids=["row group", "footer"])
def test_row_group_damaged_once_on_the_wire_is_read_whole(
    s3_url: str, build_store: BuildStore, proxy: FaultProxy, fault: Fault, part: int
) -> None:
    store = build_store(s3_url)
    behind = open_behind(store, proxy)
    rule = Rule(fault=fault, method="GET", path="data/", times=1, skip=part)
    proxy.set(rule)
    assert np.array_equal(behind.read_row_group(0).token_ids, store.read_row_group(0).token_ids)
    assert rule.hits == 1


def test_row_group_damaged_on_every_reading_names_file_and_row_group(
    s3_url: str, build_store: BuildStore, proxy: FaultProxy
) -> None:
    store = build_store(s3_url, records_per_unit=60)
    file, number = store._get_path(1), store._row_group_in_file[1]
    behind = open_behind(store, proxy)
    proxy.set(Rule(fault="corrupt", method="GET", path="data/"))
    message = rf"{file}: row group {number}: (?s:.)*run 'logitstore verify.*capture unit 0 again"
    with pytest.raises(CorruptShardError, match=message) as damaged:
        behind.read_row_group(1)
    assert damaged.value.exit_code == 3
    assert proxy.count("GET", "data/") == 2
    proxy.set(Rule(fault="truncate", method="GET", path="data/"))
    with pytest.raises(OutsideError, match=rf"{file}.*run the command again"):
        behind.read_row_group(1)


def test_server_that_ignores_the_condition_is_refused_unless_there_is_one_writer(
    wire: StoreFiles, proxy: FaultProxy, tmp_path: Path
) -> None:
    proxy.set(Rule(fault="ignore_condition", method="PUT"))
    with pytest.raises(IncompatibleStoreError, match=r"second create-only put.*single_writer: true") as raised:
        create_plan(wire, build_plan(1))
    assert raised.value.exit_code == 3
    assert [wire.list(folder) for folder in ("", "probe")] == [[], []]
    plan = create_plan(wire, build_plan(1, single_writer=True))
    assert commit_unit(wire, put(wire, "ours", tmp_path)) is Outcome.WON
    assert write_manifest(wire, plan.compute_fingerprint()).number == 1
    assert read_manifest(wire).units.tolist() == [0]


def test_server_that_knows_no_conditions_is_refused_with_the_reason(wire: StoreFiles, proxy: FaultProxy) -> None:
    proxy.set(Rule(fault="refuse", method="PUT", status=501, code="NotImplemented"))
    with pytest.raises(IncompatibleStoreError, match="only if its name is free, found one that refuses") as raised:
        create_plan(wire, build_plan(1))
    assert raised.value.exit_code == 3
    assert proxy.count("PUT") == 1
    assert wire.list("") == []


@pytest.mark.parametrize("name", OPERATIONS)
def test_denied_request_is_not_sent_again(wire: StoreFiles, proxy: FaultProxy, tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"source")
    proxy.set(Rule(fault="refuse", status=403, code="AccessDenied"))
    with pytest.raises(ConfigError, match=r"access denied.*check the credentials") as raised:
        OPERATIONS[name](wire, source)
    assert raised.value.exit_code == 2
    assert len(proxy.requests) == (2 if name == "read many" else 1)


def test_create_only_probe_passes_through_the_proxy(wire: StoreFiles, proxy: FaultProxy) -> None:
    check_create_only(wire)
    assert [request.split()[0] for request in proxy.requests] == ["PUT", "PUT", "GET", "DELETE"]
