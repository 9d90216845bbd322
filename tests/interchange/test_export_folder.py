"""Whose folder an export's is: the same export goes on in it, another is refused once there is data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from interchange.made_up_data import export_store, ignore, read_rows

from logitstore.errors import ConfigError
from logitstore.interchange.exporting import Export, ExportSettings
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore

BuildStore = Callable[..., LogitStore]


def test_export_that_was_stopped_goes_on_with_the_files_that_are_missing(
    build_store: BuildStore, tmp_path: Path
) -> None:
    store = build_store()
    export_store(store, tmp_path / "out", layout="distillkit")
    path = tmp_path / "out/data/train-0000001.parquet"
    before = {file.name: file.stat().st_mtime_ns for file in path.parent.iterdir()}
    content = path.read_bytes()
    path.unlink()
    again = Export(store, StoreFiles(str(tmp_path / "out")), ExportSettings(layout="distillkit"))
    assert again.write(ignore) == 1
    assert path.read_bytes() == content
    after = {file.name: file.stat().st_mtime_ns for file in path.parent.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {path.name}


def test_export_into_a_folder_with_another_export_prints_both_sides(build_store: BuildStore, tmp_path: Path) -> None:
    store = build_store()
    export_store(store, tmp_path / "out", layout="distillkit")
    with pytest.raises(ConfigError, match=r"holds another export(.|\n)*settings in the folder: .*'distillkit'"):
        export_store(store, tmp_path / "out", layout="axolotl")
    assert json.loads((tmp_path / "out/export.json").read_text())["settings"]["layout"] == "distillkit"


def test_export_that_failed_before_its_first_file_leaves_the_folder_to_other_settings(
    build_store: BuildStore, tmp_path: Path
) -> None:
    config = {"d": 50, "k": 8, "exact_k": 2, "polynomial_terms": [0, 1], "delta_encoding": False}
    store = build_store()
    with pytest.raises(ConfigError, match=r"choose a smaller --top-k, .* or the layout 'distillkit'"):
        export_store(store, tmp_path / "out", layout="distillkit-compressed", compression=config)
    assert not (tmp_path / "out").exists()
    export_store(store, tmp_path / "out", layout="distillkit", top_k=3)
    assert len(read_rows(tmp_path / "out")) == len(store)


def test_export_into_a_folder_that_another_claimed_meanwhile_writes_nothing(
    build_store: BuildStore, tmp_path: Path
) -> None:
    store = build_store()
    first, second = (
        Export(store, StoreFiles(str(tmp_path / "out")), ExportSettings(layout="distillkit", top_k=top_k))
        for top_k in (3, 4)
    )
    first.write(ignore)
    before = read_rows(tmp_path / "out")
    (tmp_path / "out/data/train-0000001.parquet").unlink()
    with pytest.raises(ConfigError, match="holds another export; give another folder\n"):
        second.write(ignore)
    assert first.write(ignore) == 1
    assert read_rows(tmp_path / "out") == before


def test_claim_without_a_data_file_is_named_as_one_that_may_be_removed(build_store: BuildStore, tmp_path: Path) -> None:
    store = build_store()
    export_store(store, tmp_path / "out", layout="distillkit")
    shutil.rmtree(tmp_path / "out/data")
    with pytest.raises(ConfigError, match="or empty this one if that export is not running"):
        export_store(store, tmp_path / "out", layout="axolotl")
    (tmp_path / "out/export.json").unlink()
    export_store(store, tmp_path / "out", layout="axolotl")


def test_export_into_a_folder_with_something_else_is_refused(build_store: BuildStore, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"expected an empty folder or a part of this export, found 'thesis.tex'"):
        export_store(build_store(), tmp_path / "out", layout="distillkit")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
