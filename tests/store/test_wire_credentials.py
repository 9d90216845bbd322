"""Credentials come the ways that S3's own tools know, and leave by none."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from checkout import ROOT
from fault_proxy import FaultProxy
from made_up import VOCAB_SIZE, build_plan, build_records, put_shard
from s3_server import S3Server
from tiny_models import save_model

from logitstore.corpus.files import CorpusSettings, list_corpus_files
from logitstore.errors import ConfigError
from logitstore.store.commit import QuarantinedUnit, commit_unit, quarantine_unit
from logitstore.store.files import StoreFiles
from logitstore.store.garbage import delete_garbage, find_garbage
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import write_manifest
from logitstore.store.plan import create_plan
from logitstore.store.verify import verify_store

WRONG_SECRET = "hunter2hunter2"
COMMANDS = ("inspect", "verify", "status", "gc", "plan")
IN_ENVIRONMENT = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@pytest.fixture
def new_clients() -> Iterator[None]:
    """Clients are made anew in this test: those that are kept know the credentials they were made with."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def use_store(url: str, options: dict[str, object], folder: Path) -> None:
    """What captures and readers do with a store, in one go."""
    files = StoreFiles(url, options)
    plan = create_plan(files, build_plan(2))
    for unit in range(2):
        records = build_records(4, unit=unit, vocab_size=VOCAB_SIZE)
        commit_unit(files, put_shard(files, plan, unit, records, f"attempt{unit}", folder))
    quarantine_unit(files, QuarantinedUnit(unit=1, attempts=3, error="NaN"))
    write_manifest(files, plan.compute_fingerprint())
    assert len(LogitStore.open(url, storage_options=options)) == 8
    assert verify_store(files).problems == ()
    delete_garbage(files, find_garbage(files, grace_seconds=0))


def read_everything(url: str) -> dict[str, bytes]:
    """Name and bytes of every object below a URL."""
    files = StoreFiles(url)
    prefix = url.removeprefix("s3://")
    return {name: files._fs.cat_file(name, start=0) for name in files._fs.find(prefix)}


def write_profile(folder: Path, server: S3Server, *, secret: str | None = None) -> dict[str, str]:
    """Credentials in a profile of a shared credentials file; the environment that chooses it."""
    path = folder / "credentials"
    lines = ["[default]", "aws_access_key_id = nobody", "aws_secret_access_key = nothing", "", "[teacher]"]
    lines += [f"aws_access_key_id = {server.key}", f"aws_secret_access_key = {secret or server.secret}", ""]
    path.write_text("\n".join(lines))
    return {"AWS_SHARED_CREDENTIALS_FILE": str(path), "AWS_PROFILE": "teacher"}


@pytest.mark.parametrize("way", ["environment", "AWS_PROFILE", "profile option", "key and secret options"])
def test_credentials_are_found_the_ways_that_clients_of_s3_know(
    s3_url: str,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    new_clients: None,
    way: str,
) -> None:
    options: dict[str, object] = {}
    if way != "environment":
        for name in IN_ENVIRONMENT:
            monkeypatch.delenv(name)
    if way == "AWS_PROFILE" or way == "profile option":
        for name, value in write_profile(tmp_path, s3_server).items():
            monkeypatch.setenv(name, value)
        if way == "profile option":
            monkeypatch.delenv("AWS_PROFILE")
            options = {"profile": "teacher"}
    elif way == "key and secret options":
        options = {"key": s3_server.key, "secret": s3_server.secret}
    use_store(s3_url, options, tmp_path)


def test_no_credentials_anywhere_are_a_settings_error(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, new_clients: None
) -> None:
    for name in IN_ENVIRONMENT:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    files = StoreFiles(s3_url)
    with pytest.raises(ConfigError, match=r"access denied \(Unable to locate credentials\); check the credentials"):
        files.read("plan.json")


def test_profile_that_is_not_there_is_a_settings_error(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, new_clients: None
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigError, match=r"\(nobody\) could not be found; correct the address, the environment"):
        StoreFiles(s3_url).read("plan.json")


def test_secret_in_options_reaches_no_object_log_or_text(
    s3_url: str, s3_server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, object] = {"key": s3_server.key, "secret": s3_server.secret}
    with caplog.at_level(logging.DEBUG):
        use_store(s3_url, options, tmp_path)
        said = repr(StoreFiles(s3_url, options)) + repr(LogitStore.open(s3_url, storage_options=options))
    assert "botocore" in caplog.text  # it was listened to
    assert s3_server.secret not in caplog.text + said
    stored = read_everything(s3_url)
    assert len(stored) == 7
    for name, data in stored.items():
        assert not any(word.encode() in data for word in (s3_server.secret, s3_server.key)), name


def test_wrong_secret_in_options_reaches_no_log_or_error_and_is_tried_once(
    s3_url: str, s3_server: S3Server, proxy: FaultProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, object] = {"key": s3_server.key, "secret": WRONG_SECRET, "endpoint_url": proxy.endpoint_url}
    with caplog.at_level(logging.DEBUG), pytest.raises(ConfigError, match=r"access denied.*credentials") as raised:
        use_store(s3_url, options, tmp_path)
    assert raised.value.exit_code == 2
    assert len(proxy.requests) == 1
    chain = (raised.value, raised.value.__cause__, raised.value.__context__)
    assert WRONG_SECRET not in caplog.text + "".join(f"{error!r} {error}" for error in chain)
    assert read_everything(s3_url) == {}


def test_options_travel_to_other_processes_with_the_store(s3_url: str, s3_server: S3Server, tmp_path: Path) -> None:
    options = {"key": s3_server.key, "secret": s3_server.secret}
    use_store(s3_url, options, tmp_path)
    files = pickle.loads(pickle.dumps(StoreFiles(s3_url, options)))
    store = pickle.loads(pickle.dumps(LogitStore.open(s3_url, storage_options=options)))
    assert files.storage_options == store._files.storage_options == options


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("teacher"))


@pytest.mark.slow
@pytest.mark.parametrize("is_right", [True, False], ids=["right secret in a profile", "wrong secret in environment"])
def test_command_never_prints_the_secret_and_ends_with_two_if_it_is_wrong(
    s3_url: str, s3_server: S3Server, tmp_path: Path, teacher_folder: Path, is_right: bool
) -> None:
    secret = s3_server.secret if is_right else WRONG_SECRET
    use_store(s3_url, {}, tmp_path)
    StoreFiles(s3_url).put("corpus/a.txt", b"All happy families are alike. " * 100)
    settings = tmp_path / "capture.yaml"
    corpus, teacher = {"files": [f"{s3_url}/corpus/*.txt"]}, {"model": str(teacher_folder), "device": "cpu"}
    sequences = {"length": 32}
    settings.write_text(
        yaml.safe_dump({"store": f"{s3_url}-other", "corpus": corpus, "teacher": teacher, "sequences": sequences})
    )
    environment = os.environ | {"AWS_SECRET_ACCESS_KEY": secret, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    if is_right:
        environment = {name: value for name, value in environment.items() if name not in IN_ENVIRONMENT}
        environment |= write_profile(tmp_path, s3_server, secret=secret)

    def run(command: str) -> subprocess.CompletedProcess[str]:
        target = str(settings) if command == "plan" else s3_url
        arguments = [command, target, *(["--verbose"] if is_right or command == "inspect" else [])]
        return subprocess.run(
            [sys.executable, "-m", "tools.cli", *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    with ThreadPoolExecutor(2) as pool:
        for command, done in zip(COMMANDS, pool.map(run, COMMANDS), strict=True):
            assert done.returncode == (0 if is_right else 2), f"{command}: {done.stderr}"
            assert is_right or "access denied" in done.stderr
            assert "Traceback" not in done.stderr or (command == "inspect" and not is_right)
            assert secret not in done.stdout + done.stderr
            assert s3_server.key not in done.stdout + done.stderr


def test_corpus_with_a_wrong_key_is_a_settings_error(s3_url: str, s3_server: S3Server) -> None:
    StoreFiles(s3_url).put("corpus/a.txt", b"text")
    options: dict[str, object] = {"key": s3_server.key, "secret": WRONG_SECRET}
    with pytest.raises(ConfigError, match=rf"{s3_url}/corpus.*access denied.*check the credentials") as raised:
        list_corpus_files(CorpusSettings(files=[f"{s3_url}/corpus/*.txt"]), options)
    assert WRONG_SECRET not in f"{raised.value!r} {raised.value.__cause__!r}"
