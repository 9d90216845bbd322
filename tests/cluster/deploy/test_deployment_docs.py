"""docs/deployment.md: its files are there, its settings load and fit the cluster, its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml
from typer.testing import CliRunner

from cluster.settings import ClusterCaptureSettings
from logitstore.settings import build_settings
from tests.checkout import ROOT, list_files
from tests.cluster.deploy.deployment_files import (
    DEPLOY,
    KUBERNETES_FILES,
    read_cluster_spec,
    read_document,
    read_documents,
    read_pods,
)
from tools.cli import app
from trainer.sweep.settings import read_sweep

PAGE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
# Explained on another page.
ELSEWHERE = {"Dockerfile.dockerignore", "grafana.json"}


def test_page_explains_every_file_of_the_folder() -> None:
    names = {path.name for path in list_files() if path.parent == DEPLOY} - ELSEWHERE
    assert {name for name in names if f"(../cluster/deploy/{name})" not in PAGE} == set()


def test_files_that_commands_of_the_page_name_are_there() -> None:
    named = re.findall(r"(?:-f|--file|up|down|dashboard) (cluster/deploy/\S+)", PAGE)
    assert len(named) >= 6
    assert [path for path in named if not (ROOT / path).is_file()] == []


def read_help(verbs: list[str]) -> str:
    result = CliRunner().invoke(app, [*verbs, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0, verbs
    return result.output


def test_logitstore_commands_of_the_page_exist_with_their_options() -> None:
    commands = [shlex.split(line) for line in re.findall(r"^    logitstore (.+)$", PAGE, re.MULTILINE)]
    assert {words[0] for words in commands} == {"status", "submit"}
    for words in commands:
        before, behind = (words[: words.index("--")], words[words.index("--") :]) if "--" in words else (words, [])
        verbs = words[:2] if words[0] == "submit" else words[:1]
        assert all(word in read_help(verbs) for word in before if word.startswith("--")), words
        assert all(word in read_help(verbs[1:]) for word in behind[1:] if word.startswith("--")), words


def test_trials_of_the_page_fit_the_workers_of_the_cluster() -> None:
    [options] = re.findall(r"logitstore submit sweep .* -- (--workers .*)", PAGE)
    _, workers, _, cpus, _, gpus = shlex.split(options)
    [group] = read_cluster_spec("kuberay-sweeps.yaml")["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (cpus, gpus) == (limits["cpu"], limits["nvidia.com/gpu"])
    assert int(workers) <= group["maxReplicas"]


def test_actors_of_the_page_are_settings_of_a_capture() -> None:
    for actors in re.findall(r"`actors: (\{[^`]+\})`", PAGE):
        values = {
            "store": "s",
            "corpus": {"files": ["a.jsonl"]},
            "teacher": {"model": "m"},
            "actors": yaml.safe_load(actors),
        }
        build_settings(ClusterCaptureSettings, values, where="docs/deployment.md")


def test_sweep_of_the_page_uses_the_folders_that_the_cluster_has(tmp_path: Path) -> None:
    [block] = re.findall(r"```yaml\n(# sweep.yaml\n.*?)```", PAGE, re.DOTALL)
    (tmp_path / "sweep.yaml").write_text(block, encoding="utf-8")
    sweep = read_sweep(tmp_path / "sweep.yaml")
    pods = read_pods("kuberay-sweeps.yaml")
    mounts = {name: {one["mountPath"] for one in pod["containers"][0]["volumeMounts"]} for name, pod in pods.items()}
    caches = {Path(run.settings.cache.folder) for run in sweep.runs if run.settings.cache is not None}
    assert len(sweep.runs) == 4
    assert all("/runs" in folders for folders in mounts.values())
    assert sweep.output.is_relative_to("/runs")
    assert {cache.is_relative_to("/cache") for cache in caches} == {"/cache" in mounts["gpu"]}


def test_names_in_commands_of_the_page_are_those_of_the_files() -> None:
    job, cluster = read_document("kuberay-capture.yaml", "RayJob"), read_document("kuberay-sweeps.yaml", "RayCluster")
    name = cluster["metadata"]["name"]
    assert f"job/{job['metadata']['name']}" in PAGE
    # As KubeRay names what belongs to a cluster.
    assert f"service/{name}-head-svc 8265:8265" in PAGE
    assert f"kubectl get secret {name} " in PAGE
    kinds = {document["kind"] for file in KUBERNETES_FILES for document in read_documents(file)}
    assert kinds == {"ConfigMap", "RayJob", "PersistentVolumeClaim", "RayCluster"}
