"""Training on a Ray of several nodes whose processes are killed and machines taken away: the student stays the same."""

from __future__ import annotations

import json
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fault_proxy import FaultProxy
from s3_server import BUCKET, S3Server
from taught_stores import CONFIG, build_model, fill_store
from training_cluster import TrainingCluster, run_training_cluster, wait_until
from training_runs import read_lines, read_weights, run_processes
from typer.testing import CliRunner, Result

from cluster.connection import connect
from cluster.sweep import run_sweep
from cluster.train import run_train
from cluster.worker_demand import WorkerDemand
from logitstore.settings import build_settings
from logitstore.store.files import StoreFiles
from tools.cli import app
from trainer.config import TrainSettings
from trainer.progress import StepResult
from trainer.sweep.settings import Sweep, read_sweep
from trainer.sweep.training import SweepReport, train_sweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
ONE_CPU = WorkerDemand(cpus=1.0, gpus=0.0)
STEPS = 360
# As Ray names processes that have such an actor.
WORKER, TRIAL = "ray::RayTrainWorker", "ray::ImplicitFunc"
MakeSettings = Callable[..., TrainSettings]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingCluster]:
    with run_training_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taught")
    fill_store(folder, build_model(seed=1), range(4))
    return folder / "store"


@pytest.fixture
def make_settings(store: Path, tmp_path: Path) -> MakeSettings:
    def make(name: str, **changes: object) -> TrainSettings:
        values: dict[str, object] = {
            "store": str(store),
            "student": {"config": {**CONFIG, "attention_dropout": 0.2}},
            "global_batch_sequences": 8,
            "steps": STEPS,
            "optimizer": {"learning_rate": 1e-2},
            "checkpoint_every": 20,
            "log_records": True,
            "output": str(tmp_path / name),
            "device": "cpu",
        }
        return build_settings(TrainSettings, {**values, **changes}, where="test")

    return make


def assert_same_student(one: Path, other: Path) -> None:
    weights, expected = read_weights(one / "student"), read_weights(other / "student")
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []
    for rank in (0, 1):
        name = f"records-rank{rank}.jsonl"
        assert (one / name).exists() == (other / name).exists()
        if (one / name).exists():
            assert read_lines(one / name) == read_lines(other / name)


def test_run_whose_worker_is_killed_and_whose_machine_is_taken_away_makes_the_same_student(
    cluster: TrainingCluster, make_settings: MakeSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two workers of one node; one of them is killed, then the node is drained and the run moves to the other node."""
    settings, alone = make_settings("together"), make_settings("alone")
    killed: list[int] = []
    drained: list[str] = []

    with cluster.nodes(2, 2) as nodes, connect(cluster.address):

        def disturb(result: StepResult) -> None:
            if result.step >= 30 and not killed:
                killed.append(cluster.find(WORKER)[-1])
                os.kill(killed[0], signal.SIGKILL)
            elif result.step >= 100 and not drained:
                node = cluster.find_node(cluster.find(WORKER)[0], nodes)
                drained.append(node.node_id)
                cluster.drain(node, seconds=120)

        report = run_train(settings, demand=ONE_CPU, workers=2, on_step=disturb)
    assert (report.steps, report.interrupted, report.student) == (STEPS, False, Path(settings.output) / "student")
    assert killed
    assert drained
    begun_again = [record.getMessage() for record in caplog.records if "begins again" in record.getMessage()]
    assert len(begun_again) == 2
    assert begun_again[1].endswith("it moved")
    run_processes(alone, tmp_path, 2)
    assert_same_student(Path(settings.output), Path(alone.output))


@pytest.fixture
def logitstore_train(
    cluster: TrainingCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[TrainSettings], Result]:
    """Function that runs the command with one worker on the cluster."""
    monkeypatch.setattr("tools.train.set_up_logs", lambda **_: None)  # of the whole process

    def run(settings: TrainSettings) -> Result:
        path = tmp_path / "train.yaml"
        path.write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
        return CliRunner().invoke(app, ["train", str(path), "--address", cluster.address, "--json", "--quiet"])

    return run


def test_run_that_is_asked_to_stop_is_saved_at_its_step_and_ends_with_exit_code_4(
    cluster: TrainingCluster, make_settings: MakeSettings, logitstore_train: Callable[[TrainSettings], Result]
) -> None:
    settings = make_settings("stopped", steps=1_000_000, checkpoint_every=None)
    metrics = Path(settings.output) / "metrics.jsonl"

    def stop() -> None:
        wait_until(lambda: metrics.exists() and len(read_lines(metrics)) > 1, "the first steps")
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    with cluster.nodes(1):
        stopper.start()
        result = logitstore_train(settings)
        stopper.join()
    assert result.exit_code == 4, result.stderr
    report = json.loads(result.stdout)
    assert (report["interrupted"], report["student"]) == (True, None)
    assert report["steps"] >= 20
    assert [path.name for path in (metrics.parent / "checkpoints").iterdir()] == [f"step-{report['steps']:06d}"]


def test_settings_that_no_worker_can_use_end_the_run_with_their_error_and_are_not_tried_again(
    cluster: TrainingCluster,
    make_settings: MakeSettings,
    logitstore_train: Callable[[TrainSettings], Result],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with cluster.nodes(1):
        result = logitstore_train(make_settings("unfit", student={"config": {**CONFIG, "max_position_embeddings": 8}}))
    assert (result.exit_code, result.stdout) == (3, "")
    assert "student: 8 (max_position_embeddings)" in result.stderr
    assert "begins again" not in caplog.text


@pytest.fixture
def served_store(store: Path, s3_server: S3Server, running_proxy: FaultProxy) -> dict[str, Any]:
    """Settings that read the store from an S3 server by way of a proxy, which counts requests."""
    running_proxy.set()
    options = {
        "key": s3_server.key,
        "secret": s3_server.secret,
        "client_kwargs": {"endpoint_url": running_proxy.endpoint_url},
    }
    url = f"s3://{BUCKET}/taught-{uuid.uuid4().hex}"
    files = StoreFiles(url, options)
    for path in sorted(path for path in store.rglob("*") if path.is_file()):
        files.put(str(path.relative_to(store)), path.read_bytes())
    return {"store": url, "storage_options": options}


@pytest.fixture
def write_sweep(store: Path, tmp_path: Path) -> Callable[..., Sweep]:
    def write(name: str, **changes: object) -> Sweep:
        values: dict[str, object] = {
            "store": str(store),
            "students": {"small": {"config": CONFIG}, "wide": {"config": {**CONFIG, "hidden_size": 32}}},
            "losses": {"kl": {"kind": "bucket_kl"}, "text": {"kind": "cross_entropy"}},
            "global_batch_sequences": 8,
            "steps": 60,
            "optimizer": {"learning_rate": 1e-2},
            "held_out": {"source": "held"},
            "checkpoint_every": 20,
            "device": "cpu",
            "output": str(tmp_path / name),
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**values, **changes}), encoding="utf-8")
        return read_sweep(path)

    return write


def list_figures(report: SweepReport) -> list[dict[str, Any]]:
    own = {"output", "student", "seconds", "identity", "stream", "cpus", "gpus"}
    return [run.model_dump(exclude=own) for run in report.runs]


def test_sweep_over_two_nodes_with_a_trial_that_is_killed_is_the_sweep_of_one_process(
    cluster: TrainingCluster,
    write_sweep: Callable[..., Sweep],
    served_store: dict[str, Any],
    running_proxy: FaultProxy,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = {"folder": str(tmp_path / "cache"), "max_bytes": "1GB"}
    sweep = write_sweep("together", cache=cache, **served_store)
    killed: list[int] = []

    def disturb(name: str, result: StepResult) -> None:
        if result.step >= 30 and not killed:
            killed.append(cluster.find(TRIAL)[0])
            os.kill(killed[0], signal.SIGKILL)

    with cluster.nodes(1, 1), connect(cluster.address):
        report = run_sweep(sweep, demand=ONE_CPU, workers=2, on_step=disturb)
    assert killed
    assert sum("begins again" in record.getMessage() for record in caplog.records) == 1
    assert {run.stream for run in report.runs} == {0, 1}
    assert {(run.cpus, run.gpus) for run in report.runs} == {(1.0, 0.0)}
    requests = running_proxy.count("GET", r"/data/")
    secret = served_store["storage_options"]["secret"].encode()
    assert [path for path in cluster.folder.rglob("*") if path.is_file() and secret in path.read_bytes()] == []

    alone = write_sweep("alone", cache={**cache, "folder": str(tmp_path / "cache-alone")}, **served_store)
    running_proxy.set()
    expected = train_sweep(alone)
    assert list_figures(report) == list_figures(expected)
    for run in report.runs:
        assert_same_student(Path(run.output), alone.output / run.name)
    # Three processes read through one cache what one process reads.
    assert requests == running_proxy.count("GET", r"/data/")
    written = json.loads((sweep.output / "sweep.json").read_text(encoding="utf-8"))
    assert [run["status"] for run in written["runs"]] == ["finished"] * 4
    assert (sweep.output / "sweep.csv").exists()
