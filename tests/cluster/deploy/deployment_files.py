"""The files of cluster/deploy, and the published schemas that they are held to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from jsonschema.validators import Draft202012Validator, validator_for
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from tests.checkout import ROOT

DEPLOY = ROOT / "cluster" / "deploy"
SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES_FILES = ("kuberay-capture.yaml", "kuberay-sweeps.yaml")
LAUNCHER_FILES = ("launcher-aws.yaml", "launcher-gcp.yaml")
_CORE_SCHEMAS = {
    "ConfigMap": "io.k8s.api.core.v1.ConfigMap",
    "PersistentVolumeClaim": "io.k8s.api.core.v1.PersistentVolumeClaim",
}

Document = dict[str, Any]


def read_documents(name: str) -> list[Document]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def read_document(name: str, kind: str) -> Document:
    """The one document of a kind."""
    [document] = [document for document in read_documents(name) if document["kind"] == kind]
    return document


def read_cluster_spec(name: str) -> Document:
    """What a Kubernetes file says of its Ray cluster, whether that is for one job or stays."""
    [spec] = [document["spec"] for document in read_documents(name) if document["apiVersion"].startswith("ray.io/")]
    return spec.get("rayClusterSpec", spec)


def read_pods(name: str) -> dict[str, Document]:
    """Pod specs of the head and of each group of workers."""
    cluster = read_cluster_spec(name)
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in {"head": cluster["headGroupSpec"], **groups}.items()}


def find_kubernetes_mistakes(document: Document) -> list[str]:
    """What Kubernetes or KubeRay would refuse a document for, as 'place: what is wrong'."""
    kind = document["kind"]
    if kind in _CORE_SCHEMAS:
        return _find_mistakes({"$ref": f"kubernetes.json#/$defs/{_CORE_SCHEMAS[kind]}"}, document)
    return _find_mistakes({"$ref": f"kuberay.json#/$defs/{kind}"}, document)


def find_machine_mistakes(node_config: Document) -> list[str]:
    """What Google's Compute Engine would refuse a request for a machine for."""
    return _find_mistakes({"$ref": "compute.json#/$defs/Instance"}, node_config)


def find_launcher_mistakes(config: Document) -> list[str]:
    """What `ray up` of the installed Ray would refuse a file for."""
    spec = find_spec("ray")
    assert spec is not None
    [folder] = spec.submodule_search_locations or []
    schema = Path(folder) / "autoscaler" / "ray-schema.json"
    return _find_mistakes(json.loads(schema.read_text(encoding="utf-8")), config)


def _find_mistakes(schema: Document, value: Document) -> list[str]:
    validator = validator_for(schema, Draft202012Validator)(schema, registry=_read_registry())
    return sorted(_describe(error) for error in validator.iter_errors(value))


def _describe(error: Any) -> str:
    return f"{'.'.join(str(part) for part in error.absolute_path)}: {error.message}"


@cache
def _read_registry() -> Registry[Any]:
    names = [path.name for path in SCHEMAS.glob("*.json")]
    contents = {name: json.loads((SCHEMAS / name).read_text(encoding="utf-8")) for name in names}
    resources = [(name, Resource.from_contents(one, DRAFT202012)) for name, one in contents.items()]
    return Registry().with_resources(resources)


def read_dockerfile() -> Iterator[tuple[str, str]]:
    """(instruction, arguments) of the image's Dockerfile, lines that go on joined."""
    text = re.sub(r"\\\n\s*", "", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"))
    for line in text.splitlines():
        if line and not line.startswith("#"):
            instruction, _, arguments = line.partition(" ")
            yield instruction, arguments
