"""Jobs of a real Ray head that wants a token: submitted, watched, stopped, lost with the head and taken up again."""

from __future__ import annotations

import json
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from capture_processes import PATIENCE_SECONDS, wait_until
from ray_head import RayHead
from tiny_models import save_model

from logitstore.store.commit import COMMITS, list_units, read_commit
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.plan import PLAN_PATH
from logitstore.store.verify import verify_store
from tools.quickstart import HERE
from tools.quickstart.corpus import write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SECRET_NAME = "LOGITSTORE_TEST_PASSWORD"
SECRET = f"secret{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def shared_head() -> Iterator[RayHead]:
    head = RayHead(**{SECRET_NAME: SECRET})
    yield head
    head.close()


@pytest.fixture
def head(shared_head: RayHead) -> RayHead:
    """A head that runs, whatever an earlier test did to it."""
    shared_head.ensure()
    return shared_head


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's capture, with a tiny teacher and in many units."""
    folder = tmp_path_factory.mktemp("capture")
    write_corpus(folder / "corpus", train_bytes=200_000, held_out_bytes=20_000)
    values = yaml.safe_load((HERE / "capture.yaml").read_text())
    values["store"] = str(folder / "store")
    values["corpus"]["sources"] = {
        name: [str(folder / "corpus" / f"{name}.jsonl")] for name in values["corpus"]["sources"]
    }
    values["teacher"] = {"model": str(save_model("llama", folder / "teacher")), "device": "cpu"}
    values["sequences"]["length"] = 64
    values["unit_bytes"] = 4_000
    values["actors"] = {"count": 1, "cpus": 1, "units_in_flight": 1}  # in no hurry to be done before it is killed
    path = folder / "capture.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def read_attempts(files: StoreFiles) -> dict[int, str]:
    """The attempt that committed each unit so far."""
    return {unit: read_commit(files, unit).attempt for unit in list_units(files, COMMITS)}


def test_capture_whose_head_is_killed_goes_on_when_it_is_submitted_again(head: RayHead, capture: Path) -> None:
    watcher = head.start("capture", str(capture), "--package", "--name", "first")
    files = StoreFiles(str(capture.parent / "store"))
    wait_until(lambda: files.exists(PLAN_PATH) or watcher.poll() is not None, "a plan")
    watcher.send_signal(signal.SIGINT)
    _, log = watcher.communicate(timeout=PATIENCE_SECONDS)
    assert watcher.returncode == 130, log
    assert "job first goes on" in log
    wait_until(lambda: len(list_units(files, COMMITS)) >= 2, "the first commits")
    head.kill()
    before = read_attempts(files)

    head.ensure()
    _, log = head.run("capture", str(capture), "--package", "--secret", SECRET_NAME)
    attempts = read_attempts(files)
    store = LogitStore.open(files.url)
    assert f"{len(attempts)} units planned, {len(before)} committed" in log
    assert sorted(attempts) == list(range(len(store.plan.build_unit_table())))
    assert len(attempts) > len(before) >= 2
    assert {unit: attempts[unit] for unit in before} == before
    statistics = store.compute_statistics()
    corpus = [path.read_text().splitlines() for path in (capture.parent / "corpus").iterdir()]
    assert statistics.documents == statistics.recorded_documents == sum(map(len, corpus))
    assert verify_store(files).is_clean
    check_secret_is_nowhere(head)


def check_secret_is_nowhere(head: RayHead) -> None:
    """Neither in what the head tells of its jobs and actors, nor in anything that it, a node or a job has written."""
    told = json.dumps(
        [head.ask("/api/jobs/"), head.ask("/api/v0/actors?detail=1"), head.ask("/api/v0/workers?detail=1")]
    )
    assert SECRET_NAME in told
    assert "CaptureActor" in told
    assert SECRET not in told
    written = {path: path.read_bytes() for path in head.folder.rglob("*") if path.is_file()}
    assert any(SECRET_NAME.encode() in content for content in written.values())
    assert [path for path, content in written.items() if SECRET.encode() in content] == []


def test_job_that_fails_on_the_cluster_gives_its_exit_code(head: RayHead, capture: Path) -> None:
    arguments = ("capture", str(capture), "--package", "--secret", "NO_SUCH_TOKEN", "--json")
    stdout, log = head.run(*arguments, exit_code=2)
    job = json.loads(stdout)
    assert (job["status"], job["exit_code"]) == ("FAILED", 2)
    assert "expected the cluster's machines to have NO_SUCH_TOKEN" in log


def test_job_that_is_stopped_ends(head: RayHead, capture: Path) -> None:
    store = str(capture.parent / "stopped")
    head.run("capture", str(capture), f"store={store}", "--package", "--no-wait", "--name", "stopped")
    job = json.loads(head.run("stop", "stopped", "--json")[0])
    assert job["status"] == "STOPPED", job["message"]


def test_token_that_is_missing_or_wrong_ends_with_2(head: RayHead, tmp_path: Path) -> None:
    _, stderr = head.run("status", exit_code=2, RAY_AUTH_MODE="disabled")
    assert "RAY_AUTH_MODE=token" in stderr
    (tmp_path / "token").write_text("0" * 32)
    _, stderr = head.run("status", exit_code=2, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert "RAY_AUTH_TOKEN_PATH to the token" in stderr
