"""The plan that a capture works by: joined, refused with both sides, or extended when asked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up import build_identity, build_records, put_shard

from logitstore.corpus.files import CorpusSettings
from logitstore.errors import IncompatibleStoreError
from logitstore.planning import CaptureSettings, find_new_files, open_plan
from logitstore.store.commit import commit_unit
from logitstore.store.extension import build_extension_path
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import write_manifest
from logitstore.store.plan import StorePlan, read_plan
from logitstore.store.repair import repair_store
from logitstore.store.verify import verify_store

WriteCorpus = Callable[..., CaptureSettings]


@pytest.fixture
def write_corpus(tmp_path: Path) -> WriteCorpus:
    """Function that writes text files and returns settings of a capture of them."""

    def write(*names: str, **changes: object) -> CaptureSettings:
        for name in names:
            path = tmp_path / "corpus" / name
            path.parent.mkdir(exist_ok=True)
            if not path.exists():
                path.write_text(f"the text of {name} " * 20)
        values: dict[str, object] = {
            "store": str(tmp_path / "store"),
            "corpus": CorpusSettings(files=[str(tmp_path / "corpus" / name) for name in names]),
            "teacher": {"model": "made-up"},
            "unit_bytes": 300,
        }
        return CaptureSettings.model_validate({**values, **changes})

    return write


def open_with(settings: CaptureSettings, **options: Any) -> StorePlan:
    return open_plan(StoreFiles(settings.store), settings, build_identity(), **options)


def test_capture_with_more_files_is_refused_unless_asked_to_extend(write_corpus: WriteCorpus) -> None:
    assert len(open_with(write_corpus("a.txt", "b.txt")).build_unit_table()) == 2
    more = write_corpus("a.txt", "b.txt", "c.txt")
    with pytest.raises(IncompatibleStoreError, match=r"1 not in the store, first '.*c\.txt'\n.*--extend"):
        open_with(more)
    assert len(open_with(more, extend=True).build_unit_table()) == 3
    assert len(open_with(more).build_unit_table()) == 3
    assert len(open_with(more, extend=True).extensions) == 1  # nothing is left to add


def test_extending_capture_need_not_list_what_the_store_has(write_corpus: WriteCorpus) -> None:
    open_with(write_corpus("a.txt", "b.txt"))
    plan = open_with(write_corpus("c.txt"), extend=True)
    assert [Path(file.path).name for file in plan.files] == ["a.txt", "b.txt", "c.txt"]
    with pytest.raises(IncompatibleStoreError, match="2 not in this capture, first"):
        open_with(write_corpus("c.txt"))


def test_changed_file_is_refused_also_when_extending(write_corpus: WriteCorpus, tmp_path: Path) -> None:
    open_with(write_corpus("a.txt"))
    (tmp_path / "corpus" / "a.txt").write_text("another text")
    for extend in (False, True):
        with pytest.raises(IncompatibleStoreError, match=r"corpus file '.*a\.txt'\n    in the store: .* 360 bytes"):
            open_with(write_corpus("a.txt", "b.txt"), extend=extend)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"method": {"kind": "top_k", "k": 3}}, r"method\.k\n    in the store:     64\n    in this capture:  3"),
        ({"seed": 5}, "seed"),
        ({"shard": {"codec": {"kind": "float32"}}}, r"shard\.codec\.kind"),
    ],
)
def test_other_settings_are_refused_also_when_extending(
    changes: dict[str, object], line: str, write_corpus: WriteCorpus
) -> None:
    open_with(write_corpus("a.txt"))
    with pytest.raises(IncompatibleStoreError, match=line):
        open_with(write_corpus("a.txt", "b.txt", **changes), extend=True)


def test_unit_size_may_change_with_an_extension_only(write_corpus: WriteCorpus) -> None:
    open_with(write_corpus("a.txt"))
    with pytest.raises(IncompatibleStoreError, match="unit_bytes"):
        open_with(write_corpus("a.txt", unit_bytes=10_000))
    plan = open_with(write_corpus("a.txt", "b.txt", "c.txt", unit_bytes=10_000), extend=True)
    assert len(plan.build_unit_table()) == 2
    assert open_with(write_corpus("a.txt", "b.txt", "c.txt", unit_bytes=10_000)).unit_bytes == 300


def test_two_captures_that_extend_at_once_add_every_file_once(write_corpus: WriteCorpus, tmp_path: Path) -> None:
    open_with(write_corpus("a.txt"))
    settings = [write_corpus("a.txt", *names) for names in (("b.txt", "c.txt"), ("c.txt", "d.txt"), ("b.txt", "d.txt"))]
    barrier = threading.Barrier(len(settings))

    def extend(chosen: CaptureSettings) -> None:
        barrier.wait()
        open_with(chosen, extend=True)

    threads = [threading.Thread(target=extend, args=(chosen,)) for chosen in settings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plan = read_plan(StoreFiles(str(tmp_path / "store")))
    assert sorted(Path(file.path).name for file in plan.files) == ["a.txt", "b.txt", "c.txt", "d.txt"]
    assert len(plan.build_unit_table()) == 4


def test_capture_that_was_killed_before_its_extension_leaves_the_store_as_it_was(
    write_corpus: WriteCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = StoreFiles(str(tmp_path / "store"))
    before = open_with(write_corpus("a.txt"))

    def die(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(StoreFiles, "create", die)
        with pytest.raises(KeyboardInterrupt):
            open_with(write_corpus("a.txt", "b.txt"), extend=True)
    assert read_plan(files).files == before.files
    added = find_new_files(files.url, before, write_corpus("a.txt", "b.txt"), build_identity(), extend=True)
    assert [Path(file.path).name for file in added] == ["b.txt"]


def test_store_whose_extension_is_lost_is_neither_read_nor_repaired_nor_extended(
    write_corpus: WriteCorpus, tmp_path: Path
) -> None:
    files = StoreFiles(str(tmp_path / "store"))
    open_with(write_corpus("a.txt"))
    plan = open_with(write_corpus("a.txt", "b.txt"), extend=True)
    for unit in range(2):
        commit_unit(files, put_shard(files, plan, unit, build_records(2, unit=unit), "a", tmp_path))
    write_manifest(files, plan.compute_fingerprint())
    extension = files.read(build_extension_path(2))
    files.delete(build_extension_path(2))
    verification = verify_store(files)
    assert [problem.unit for problem in verification.problems] == [None]
    assert "restore it" in verification.problems[0].what_to_do
    for act in (
        lambda: LogitStore.open(files.url),
        lambda: repair_store(files, verification),
        lambda: open_with(write_corpus("a.txt", "c.txt"), extend=True),
    ):
        with pytest.raises(IncompatibleStoreError, match=r"found unit 1: a plan-<n>\.json is missing"):
            act()
    files.put(build_extension_path(2), extension)
    assert verify_store(files).is_clean
    assert len(LogitStore.open(files.url)) == 4
