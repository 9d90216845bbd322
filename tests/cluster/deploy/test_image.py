"""The image: that it has what the other files take for granted. (Nothing here builds it.)"""

from __future__ import annotations

import re
import tomllib
from typing import Any

from tests.checkout import PACKAGES, ROOT, list_files
from tests.cluster.deploy.deployment_files import (
    DEPLOY,
    KUBERNETES_FILES,
    LAUNCHER_FILES,
    read_cluster_spec,
    read_dockerfile,
    read_documents,
    read_pods,
)


def read_project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read_defaults() -> dict[str, str]:
    """The build arguments that have a value unless one is given."""
    arguments = [argument.partition("=") for instruction, argument in read_dockerfile() if instruction == "ARG"]
    return {name: value for name, separator, value in arguments if separator}


def test_image_has_the_ray_that_clusters_of_kuberay_are_said_to_have() -> None:
    version = read_defaults()["RAY_VERSION"]
    assert {read_cluster_spec(name)["rayVersion"] for name in KUBERNETES_FILES} == {version}
    least = re.search(r"ray\[default\]>=([\d.]+)", "\n".join(read_project()["project"]["optional-dependencies"]["ray"]))
    assert least is not None
    assert [int(part) for part in version.split(".")] >= [int(part) for part in least[1].split(".")]


def test_image_is_the_same_in_every_file() -> None:
    images = {pod["containers"][0]["image"] for name in KUBERNETES_FILES for pod in read_pods(name).values()}
    images |= {config["docker"]["image"] for name in LAUNCHER_FILES for config in read_documents(name)}
    [image] = images
    assert f"--tag {image} ." in (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


def test_image_installs_extras_that_exist_and_all_that_a_cluster_needs() -> None:
    extras = set(read_defaults()["EXTRAS"].split(","))
    assert extras <= read_project()["project"]["optional-dependencies"].keys()
    assert extras >= {"ray", "ray-train", "vllm", "lora", "s3", "gcs", "azure"}


def test_image_is_built_of_what_makes_the_wheel_and_of_nothing_else() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    project = read_project()["project"]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == {
        "pyproject.toml", project["readme"], *project["license-files"], *PACKAGES,
    }  # fmt: skip


def test_files_of_the_folder_are_shipped_with_the_package() -> None:
    patterns = read_project()["tool"]["setuptools"]["package-data"]["cluster"]
    files = [path.relative_to(ROOT / "cluster") for path in list_files() if path.is_relative_to(DEPLOY)]
    assert all(any(file.match(pattern) for pattern in patterns) for file in files)
