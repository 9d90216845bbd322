"""What a release contains: the four packages with their data, and nothing else."""

from __future__ import annotations

import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

from tests.checkout import PACKAGES, ROOT, list_files, list_modules
from tests.wheel import build_wheel

pytestmark = pytest.mark.slow

DATA = ("logitstore/FORMAT.md", *(f"{package}/py.typed" for package in PACKAGES))
DATA_FOLDERS = {"tools/quickstart/teacher", "cluster/deploy"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    return zipfile.Path(build_wheel(tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def names(wheel: zipfile.Path) -> set[str]:
    return {name for name in wheel.root.namelist() if not name.endswith("/")}


def read_dist_info(wheel: zipfile.Path, name: str) -> bytes:
    (folder,) = [path for path in wheel.iterdir() if path.name.endswith(".dist-info")]
    return (folder / name).read_bytes()


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.Path) -> Message:
    return message_from_bytes(read_dist_info(wheel, "METADATA"))


def test_wheel_holds_the_four_packages_and_nothing_else(names: set[str]) -> None:
    folders = {name.partition("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == set(PACKAGES)
    assert len(folders) == len(PACKAGES) + 1


def test_wheel_holds_every_module_of_the_checkout(names: set[str]) -> None:
    expected = {path.relative_to(ROOT).as_posix() for path in list_modules()}
    assert {name for name in names if name.endswith(".py")} == expected


def test_wheel_holds_the_files_that_are_read_at_run_time(names: set[str]) -> None:
    shipped = {
        path.relative_to(ROOT).as_posix()
        for path in list_files()
        if path.parent.relative_to(ROOT).as_posix() in DATA_FOLDERS or path.suffix in {".html", ".css", ".js"}
    }
    expected = {name for name in shipped if name.partition("/")[0] in PACKAGES} | set(DATA)
    assert expected - names == set()
    assert any(name.startswith("tools/quickstart/teacher/") and name.endswith(".safetensors") for name in names)


def test_wheel_states_licence_command_and_extras(wheel: zipfile.Path, metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert read_dist_info(wheel, "entry_points.txt").decode().split("\n")[1] == "logitstore = tools.cli:main"
    assert set(metadata.get_all("Provides-Extra", [])) == {
        "teacher", "api", "train", "lora", "export", "adamw8bit", "harness", "fast", "query", "ray", "ray-train", "s3",
        "gcs", "azure", "vllm", "vllm-cpu", "quickstart", "plot", "test-vllm", "dev",
    }  # fmt: skip


def test_wheel_without_extras_requires_nothing_heavy(metadata: Message) -> None:
    base = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {line.partition(">=")[0] for line in base} == {
        "numpy", "pyarrow", "zstandard", "fsspec", "pydantic", "pyyaml", "typer", "rich",
    }  # fmt: skip


def test_wheel_is_small_enough_to_carry_a_teacher_of_twelve_megabytes(wheel: zipfile.Path) -> None:
    assert Path(str(wheel.root.filename)).stat().st_size < 14_000_000
