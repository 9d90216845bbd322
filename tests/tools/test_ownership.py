"""Foreign packages under the project's names are told from the project's own."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest

from logitstore.errors import ConfigError
from tools import ownership

HOME = Path(ownership.__file__).parents[1]


def write_package(folder: Path, text: str) -> Path:
    init = folder / "cluster" / "__init__.py"
    init.parent.mkdir(parents=True)
    init.write_text(text, encoding="utf-8")
    return init


def shadow_cluster(monkeypatch: pytest.MonkeyPatch, spec: importlib.machinery.ModuleSpec | None) -> None:
    """Make `cluster` resolve to another spec, as a path entry in front of ours would."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "cluster" else find_spec(name))


def find_in(folder: Path) -> importlib.machinery.ModuleSpec | None:
    return importlib.machinery.PathFinder.find_spec("cluster", [str(folder)])


def test_check_packages_with_our_packages_passes() -> None:
    ownership.check_packages_are_ours()


def test_check_packages_with_a_foreign_package_names_both_paths_and_does_not_import_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = write_package(tmp_path, "raise SystemExit('imported')\n")
    shadow_cluster(monkeypatch, find_in(tmp_path))
    with pytest.raises(ConfigError) as caught:
        ownership.check_packages_are_ours()
    assert f"cluster: {init} shadows {HOME / 'cluster'}" in str(caught.value)
    assert "trainer:" not in str(caught.value)


def test_check_packages_with_an_installed_foreign_package_names_its_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_package(tmp_path, "")
    shadow_cluster(monkeypatch, find_in(tmp_path))
    monkeypatch.setattr(ownership, "packages_distributions", lambda: {"cluster": ["dask-farm", "logitstore"]})
    with pytest.raises(ConfigError, match=r"\(installed by dask-farm\)"):
        ownership.check_packages_are_ours()


def test_check_packages_with_a_second_copy_of_ours_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path, 'OWNER = "logitstore"\n')
    shadow_cluster(monkeypatch, find_in(tmp_path))
    with pytest.raises(ConfigError, match="of another copy of logitstore"):
        ownership.check_packages_are_ours()


def test_check_packages_with_a_mark_of_another_owner_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = write_package(tmp_path, 'OWNER = "someone"\n')
    shadow_cluster(monkeypatch, find_in(tmp_path))
    with pytest.raises(ConfigError) as caught:
        ownership.check_packages_are_ours()
    assert f"cluster: {init} shadows" in str(caught.value)


def test_check_packages_with_a_plain_folder_in_front_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cluster").mkdir()
    shadow_cluster(monkeypatch, find_in(tmp_path))
    with pytest.raises(ConfigError, match=r"a folder without __init__\.py at .*cluster shadows"):
        ownership.check_packages_are_ours()


def test_check_packages_with_a_missing_package_asks_to_install_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shadow_cluster(monkeypatch, None)
    with pytest.raises(ConfigError, match="cluster: no such package; install logitstore again"):
        ownership.check_packages_are_ours()
