"""What storages do to a store: ambiguous answers, errors of every class, file systems without hard links."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from made_up import build_plan

from logitstore.errors import ConfigError, IncompatibleStoreError, LogitStoreError, OutsideError
from logitstore.store.commit import QUARANTINE, QuarantinedUnit, list_units, quarantine_unit, read_quarantine
from logitstore.store.create_only import check_create_only, create_or_read_back
from logitstore.store.files import PARALLEL_READS, READ_AHEAD, StoreFiles
from logitstore.store.manifest import list_manifests, write_manifest
from logitstore.store.plan import PLAN_PATH, create_plan, read_plan

FAULTS = ("stored, client tried again", "stored, answer lost", "409, nothing stored", "unreachable")


class AmbiguousFiles(StoreFiles):
    """A store whose next creates of a kind of object answer as object stores do on a bad day."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.faults: list[str] = []
        self.prefix = ""

    def create(self, path: str, data: bytes) -> bool:
        fault = self.faults.pop(0) if self.faults and path.startswith(self.prefix) else None
        if fault is None:
            return super().create(path, data)
        if fault.startswith("stored"):
            super().create(path, data)
        if fault in ("stored, answer lost", "unreachable"):
            raise OutsideError("connection reset")
        return False


@pytest.fixture
def files(tmp_path: Path) -> AmbiguousFiles:
    return AmbiguousFiles(str(tmp_path / "store"))


@pytest.mark.parametrize("fault", FAULTS)
def test_every_create_only_write_settles_an_ambiguous_answer(files: AmbiguousFiles, fault: str) -> None:
    def write(prefix: str, act: Callable[[], Any]) -> None:
        files.prefix, files.faults = prefix, [fault, fault]
        act()
        assert len(files.faults) < 2

    files.faults = [fault, fault]
    assert create_or_read_back(files, "probe/any", b"ours")
    write(PLAN_PATH, lambda: create_plan(files, build_plan(1)))
    write(QUARANTINE, lambda: quarantine_unit(files, QuarantinedUnit(unit=0, attempts=3, error="NaN")))
    write("manifest", lambda: write_manifest(files, read_plan(files).compute_fingerprint()))
    write("probe", lambda: check_create_only(files))
    assert list_units(files, QUARANTINE) == [0]
    assert list_manifests(files) == [1]


def test_create_only_write_of_what_another_wrote_is_lost(files: AmbiguousFiles) -> None:
    files.put("plan.json", b"theirs")
    for fault in ([], ["unreachable"], ["409, nothing stored"]):
        files.faults = list(fault)
        assert not create_or_read_back(files, "plan.json", b"ours")
    assert create_or_read_back(files, "plan.json", b"ours", lambda found: found == b"theirs")


def test_quarantine_record_deleted_between_listing_and_reading_is_left_out(
    files: AmbiguousFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    for unit in (1, 2):
        quarantine_unit(files, QuarantinedUnit(unit=unit, attempts=3, error="NaN"))
    monkeypatch.setattr("logitstore.store.commit.list_units", lambda *_: [1, 2, 3])
    assert [entry.unit for entry in read_quarantine(files)] == [1, 2]


def test_reads_in_flight_and_ahead_of_a_slow_consumer_are_bounded(
    files: AmbiguousFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    full, go_on = threading.Event(), threading.Event()

    def read(path: str, *_: object) -> bytes:
        started.append(path)
        if len(started) == PARALLEL_READS:
            full.set()
        assert go_on.wait(60)
        return b"x"

    monkeypatch.setattr(files, "read", read)
    paths = [str(number) for number in range(1000)]
    with ThreadPoolExecutor(1) as consumer:
        first = consumer.submit(next, found := files.read_many(paths))
        assert full.wait(60)
        assert len(started) == PARALLEL_READS
        go_on.set()
        assert first.result() == b"x"
    assert len(started) <= READ_AHEAD
    assert len(list(found)) == 999


def build_error(name: str, message: str = "", **attributes: object) -> Exception:
    error = type(name, (Exception,), {})(message)
    for key, value in attributes.items():
        setattr(error, key, value)
    return error  # type: ignore[no-any-return]  # built by type()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (build_error("ClientError", "SlowDown"), OutsideError),
        (build_error("ServerDisconnectedError"), OutsideError),
        (build_error("HttpError", "backend error", code=503), OutsideError),
        (TimeoutError(), OutsideError),
        (ValueError("bad gateway"), OutsideError),
        (build_error("NoCredentialsError", "Unable to locate credentials"), ConfigError),
        (build_error("DefaultCredentialsError"), ConfigError),
        (build_error("ProfileNotFound", "The config profile (teacher) could not be found"), ConfigError),
        (ValueError("Invalid endpoint: nonsense"), ConfigError),
        (build_error("ClientError", "x", response={"Error": {"Code": "ExpiredToken"}}), ConfigError),
        (build_error("ParamValidationError", "Invalid bucket name"), ConfigError),
        (build_error("ClientAuthenticationError"), ConfigError),
        (build_error("HttpError", "Forbidden: https://storage/x"), ConfigError),
        (build_error("HttpError", "no", code=403), ConfigError),
        (build_error("ClientError", "x", response={"ResponseMetadata": {"HTTPStatusCode": 401}}), ConfigError),
        (PermissionError("denied"), ConfigError),
        (NotADirectoryError("x"), ConfigError),
        (NotImplementedError(), ConfigError),
        (TypeError("a bug"), TypeError),
        (AttributeError("a bug"), AttributeError),
        (KeyError("a bug"), KeyError),
        (AssertionError("a bug"), AssertionError),
        (FileNotFoundError("x"), FileNotFoundError),
        (build_error("ResourceNotFoundError", "no container", status_code=404), FileNotFoundError),
        (IncompatibleStoreError("x"), IncompatibleStoreError),
    ],
    ids=repr,
)
def test_errors_of_storage_clients_are_told_apart(
    files: AmbiguousFiles, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[Exception]
) -> None:
    def fail(*_: Any, **__: Any) -> bytes:
        raise error

    monkeypatch.setattr(files._fs, "cat_file", fail)
    with pytest.raises(expected) as raised:
        files.read("plan.json")
    assert type(raised.value) is expected
    if isinstance(raised.value, LogitStoreError) and raised.value is not error:
        assert "plan.json" in str(raised.value)
        assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [FileExistsError(), build_error("ResourceExistsError"), build_error("HttpError", "conditionNotMet", code=412)],
    ids=repr,
)
def test_create_on_a_taken_name_is_recognized_in_every_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    files = StoreFiles(f"memory://{tmp_path.name}")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(files._fs, "pipe_file", fail)
    assert not files.create("plan.json", b"")


@pytest.mark.parametrize(
    "error", [FileNotFoundError("NoSuchBucket"), build_error("ResourceNotFoundError", "no container", status_code=404)]
)
def test_write_to_a_bucket_that_is_not_there_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    files = StoreFiles(f"memory://{tmp_path.name}")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(files._fs, "pipe_file", fail)
    with pytest.raises(ConfigError, match="create the bucket or correct the address"):
        files.create("plan.json", b"")


def test_store_address_that_is_a_file_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("not a folder")
    files = StoreFiles(str(tmp_path / "store"))
    for act in (lambda: read_plan(files), lambda: create_plan(files, build_plan(1)), lambda: files.put("a/b", b"")):
        with pytest.raises(ConfigError, match="check the address") as raised:
            act()
        assert raised.value.exit_code == 2


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_file_system_without_hard_links_is_refused_with_the_reason(
    files: AmbiguousFiles, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(IncompatibleStoreError, match="expected a file system with hard links"):
        create_plan(files, build_plan(1))
    assert not [path for path in Path(files.url).rglob("*") if path.is_file()]


@pytest.mark.skipif(os.name != "posix", reason="folders cannot be synced elsewhere")
@pytest.mark.parametrize("write", ["create", "put"])
def test_local_write_syncs_file_then_folder(files: AmbiguousFiles, monkeypatch: pytest.MonkeyPatch, write: str) -> None:
    files.put("commits/first", b"")  # makes the folder
    synced: list[tuple[bool, bool]] = []
    target = Path(files.url, "commits", "second")

    def note(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), target.exists()))

    monkeypatch.setattr(os, "fsync", note)
    getattr(files, write)("commits/second", b"data")
    assert synced == [(False, False), (True, True)]  # (is the folder, is published already)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://user:hunter2@host/store",
        "https://hunter2@host/store",
        "simplecache::ftp://user:hunter2@host/store",
        "https://host/store?sig=hunter2",
        "https://host/store?x=1&X-Amz-Signature=hunter2",
        "https://host/store?token=hunter2&x=1",
    ],
)
def test_url_with_a_secret_is_refused_without_printing_it(url: str) -> None:
    with pytest.raises(ConfigError, match="storage_options or in the environment") as raised:
        StoreFiles(url)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["memory://b/year=202?/key=1", "memory://container@account/x", "/data/a@b:c", "memory://b/x@y:z"]
)
def test_url_that_only_looks_odd_is_accepted(url: str) -> None:
    assert StoreFiles(url).url == url
