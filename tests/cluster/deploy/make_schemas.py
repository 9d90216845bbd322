"""Cuts the test data `schemas/kubernetes.json` and `schemas/compute.json` out of the packages that publish it.

    pip install --no-deps --target FOLDER kubernetes-validate google-api-python-client
    python -m tests.cluster.deploy.make_schemas FOLDER

Descriptions are left out, and whatever the deployment files have no use for. `schemas/kuberay.json` is written by hand:
see its `$comment`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES = "kubernetes_validate/kubernetes-json-schema/v1.34.0-local-strict/_definitions.json"
KUBERNETES_ROOTS = (
    "io.k8s.api.core.v1.PodTemplateSpec",
    "io.k8s.api.core.v1.ConfigMap",
    "io.k8s.api.core.v1.PersistentVolumeClaim",
    "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta",
)
COMPUTE = "googleapiclient/discovery_cache/documents/compute.v1.json"
_KEPT = {
    "$ref",
    "type",
    "properties",
    "items",
    "required",
    "additionalProperties",
    "enum",
    "oneOf",
    "format",
    "minimum",
}


def _find_references(schema: object) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].rpartition("/")[2]
        for value in schema.values():
            yield from _find_references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _find_references(value)


def _trim(schema: Any, name_reference: Callable[[str], str]) -> Any:
    """A schema without what only explains it; the keys of `properties` are names, and all stay."""
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key in _KEPT}
    for key, value in kept.items():
        if key == "$ref":
            kept[key] = name_reference(value)
        elif key == "properties":
            kept[key] = {name: _trim(one, name_reference) for name, one in value.items()}
        elif key in ("items", "additionalProperties"):
            kept[key] = _trim(value, name_reference)
        elif key == "oneOf":
            kept[key] = [_trim(one, name_reference) for one in value]
    return kept


def _collect(definitions: dict[str, Any], roots: tuple[str, ...]) -> dict[str, Any]:
    """The roots and all that they refer to."""
    found: dict[str, Any] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = _trim(definitions[name], lambda reference: f"#/$defs/{reference.rpartition('/')[2]}")
            waiting.extend(_find_references(found[name]))
    return dict(sorted(found.items()))


def make_kubernetes(folder: Path) -> dict[str, Any]:
    """Pods and what stands beside them, closed against unknown fields."""
    definitions = json.loads((folder / KUBERNETES).read_text(encoding="utf-8"))["$defs"]
    comment = f"Kubernetes, Apache-2.0, as packed by kubernetes-validate 1.37.0: {KUBERNETES}; see make_schemas.py."
    return {"$comment": comment, "$defs": _collect(definitions, KUBERNETES_ROOTS)}


def make_compute(folder: Path) -> dict[str, Any]:
    """What a request for a machine of Google's may hold, closed against unknown fields."""
    document = json.loads((folder / COMPUTE).read_text(encoding="utf-8"))
    definitions = _collect(document["schemas"], ("Instance",))
    for definition in definitions.values():
        definition.setdefault("additionalProperties", False)
    comment = (
        f"Compute Engine v1, revision {document['revision']}, Apache-2.0, as packed by google-api-python-client "
        f"2.202.0: {COMPUTE}; see make_schemas.py."
    )
    return {"$comment": comment, "$defs": definitions}


def main() -> None:
    folder = Path(sys.argv[1])
    for name, schema in (("kubernetes", make_kubernetes(folder)), ("compute", make_compute(folder))):
        text = json.dumps(schema, indent=None, separators=(",", ":")).replace('"io.k8s.', '\n"io.k8s.')
        (SCHEMAS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
