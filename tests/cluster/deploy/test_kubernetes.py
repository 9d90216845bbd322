"""The files for KubeRay: what the published schemas allow, and what they are made for."""

from __future__ import annotations

import copy
import shlex
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster.settings import ClusterCaptureSettings
from logitstore.settings import build_settings
from tests.cluster.deploy.deployment_files import (
    KUBERNETES_FILES,
    Document,
    find_kubernetes_mistakes,
    read_cluster_spec,
    read_document,
    read_documents,
    read_pods,
)
from tools.cli import app

CAPTURE = "kuberay-capture.yaml"
DRAIN_TIMEOUT = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"


def read_capture_settings() -> ClusterCaptureSettings:
    values = yaml.safe_load(read_document(CAPTURE, "ConfigMap")["data"]["capture.yaml"])
    return build_settings(ClusterCaptureSettings, values, where=CAPTURE)


def change(document: Document, place: str, value: Any) -> Document:
    """The document with one value set, its place as in 'spec.rayClusterSpec.workerGroupSpecs.0.replicas'."""
    changed = copy.deepcopy(document)
    *sections, last = [int(part) if part.isdecimal() else part for part in place.split(".")]
    target: Any = changed
    for section in sections:
        target = target[section]
    if value is None:
        del target[last]
    else:
        target[last] = value
    return changed


@pytest.mark.parametrize("name", KUBERNETES_FILES)
def test_kubernetes_file_fits_the_published_schemas(name: str) -> None:
    assert [mistake for document in read_documents(name) for mistake in find_kubernetes_mistakes(document)] == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("spec.entryPoint", "true"),
        ("spec.submissionMode", "JobMode"),
        ("spec.backoffLimit", "5"),
        ("spec.shutdownAfterJobFinishes", False),
        ("spec.rayClusterSpec.rayVersion", None),
        ("spec.rayClusterSpec.rayVersion", "2.51.0"),
        ("spec.rayClusterSpec.authOptions.mode", "tokens"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.resource", {}),
        ("spec.rayClusterSpec.workerGroupSpecs.0.minReplica", 0),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.restartPolicy", "Always"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.tolerations.0.effects", "NoSchedule"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers", []),
        ("metadata.name", "Logitstore"),
    ],
)
def test_schemas_with_a_mistake_in_a_job_name_its_place(place: str, value: Any) -> None:
    job = change(read_document(CAPTURE, "RayJob"), place, value)
    assert find_kubernetes_mistakes(job) != []


def test_capture_settings_of_the_job_are_valid_and_lie_where_it_looks() -> None:
    job, settings = read_document(CAPTURE, "RayJob"), read_document(CAPTURE, "ConfigMap")
    head = read_pods(CAPTURE)["head"]
    [mount] = [mount for mount in head["containers"][0]["volumeMounts"] if mount["name"] == "settings"]
    [volume] = [volume for volume in head["volumes"] if volume["name"] == "settings"]
    program, verb, path, *options = shlex.split(job["spec"]["entrypoint"])
    assert volume["configMap"]["name"] == settings["metadata"]["name"]
    assert [program, verb, path] == ["logitstore", "capture", f"{mount['mountPath']}/capture.yaml"]
    assert options == ["--address", "auto"]
    assert "--address" in CliRunner().invoke(app, ["capture", "--help"], env={"NO_COLOR": "1"}).output
    assert read_capture_settings().teacher.engine == "vllm"


def test_capture_job_asks_for_as_many_actors_as_its_workers_have_room_for() -> None:
    actors, [group] = read_capture_settings().actors, read_cluster_spec(CAPTURE)["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (actors.count, actors.cpus, actors.gpus) == (
        group["maxReplicas"],
        float(limits["cpu"]),
        float(limits["nvidia.com/gpu"]),
    )


def test_capture_job_starts_with_no_worker_and_outlives_its_head() -> None:
    job, [group] = read_document(CAPTURE, "RayJob")["spec"], read_cluster_spec(CAPTURE)["workerGroupSpecs"]
    assert job["backoffLimit"] > 0
    assert job["shutdownAfterJobFinishes"]
    assert group["replicas"] == 0


def list_terms(pod: Document) -> list[list[Document]]:
    required = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    return [term["matchExpressions"] for term in required["nodeSelectorTerms"]]


def test_capture_workers_are_on_spot_machines_and_the_head_is_on_none() -> None:
    pods = read_pods(CAPTURE)
    head, spot = list_terms(pods["head"]), list_terms(pods["spot-gpu"])
    assert [{one["operator"] for one in term} for term in head] == [{"NotIn"}]
    assert {one["operator"] for term in spot for one in term} == {"In"}
    # One term is enough, and all that stands in a term has to hold: hence terms for workers, and one for the head.
    assert {(term[0]["key"], *term[0]["values"]) for term in spot if len(term) == 1} == {
        (one["key"], *one["values"]) for one in head[0]
    }


@pytest.mark.parametrize("name", KUBERNETES_FILES)
def test_ray_cluster_asks_for_tokens_and_grows_from_no_worker(name: str) -> None:
    cluster = read_cluster_spec(name)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == 0 < group["maxReplicas"]
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in group["template"]["spec"][
            "tolerations"
        ]


@pytest.mark.parametrize("name", KUBERNETES_FILES)
def test_workers_that_are_evicted_drain_before_they_are_killed(name: str) -> None:
    for pod in [pod for group, pod in read_pods(name).items() if group != "head"]:
        [seconds] = [float(one["value"]) for one in pod["containers"][0]["env"] if one["name"] == DRAIN_TIMEOUT]
        assert 30 < seconds < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("name", KUBERNETES_FILES)
def test_pods_mount_volumes_that_they_have_and_are_given_what_they_ask_for(name: str) -> None:
    claims = {one["metadata"]["name"] for one in read_documents(name) if one["kind"] == "PersistentVolumeClaim"}
    for pod in read_pods(name).values():
        [container] = pod["containers"]
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        claimed = [volume["persistentVolumeClaim"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
        assert {claim["claimName"] for claim in claimed} <= claims


@pytest.mark.parametrize("name", KUBERNETES_FILES)
def test_secrets_reach_pods_by_reference_only(name: str) -> None:
    for pod in read_pods(name).values():
        [container] = pod["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "logitstore-credentials", "optional": True}}]
        assert {variable["name"] for variable in container.get("env", [])} <= {DRAIN_TIMEOUT, "HF_HOME"}
    [ray] = [document for document in read_documents(name) if document["apiVersion"].startswith("ray.io/")]
    # Ray shows a job's runtime environment to whoever may look at its dashboard.
    assert "runtimeEnvYAML" not in ray["spec"]
    assert "storage_options" not in read_capture_settings().model_fields_set
