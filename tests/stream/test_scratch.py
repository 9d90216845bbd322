"""Streams that keep decompressed row groups in a scratch file: the same batches, whatever becomes of the file."""

from __future__ import annotations

import logging
import os
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from file_limits import files_of_at_most

from logitstore.errors import ConfigError
from logitstore.shard.codec import CompactCodec
from logitstore.store.aligned_stores import AlignedStores
from logitstore.store.logit_store import LogitStore
from logitstore.stream.iterator import RecordStream
from logitstore.stream.scratch import RowGroupScratch, ScratchSettings, ScratchStatistics
from logitstore.stream.source import StreamSource
from logitstore.stream.source_reader import SourceReader
from logitstore.teacher.protocol import SampleMethod
from tests.stream.source_streams import choose_records
from tests.stream.test_batches import check_batches_are_equal
from tests.stream_processes import take_addresses

pytest.importorskip("xxhash")
BuildStore = Callable[..., LogitStore]
EPOCHS = 3
# So few row groups are held at once that every epoch has to read them again.
TIGHT: dict[str, Any] = {"lanes": 1, "window_row_groups": 1, "read_ahead_steps": 1, "read_ahead_row_groups": 0}


@pytest.fixture
def settings(tmp_path: Path) -> ScratchSettings:
    return ScratchSettings(folder=str(tmp_path / "scratch"), max_bytes=1 << 24)


@pytest.fixture
def store(build_store: BuildStore) -> LogitStore:
    return build_store(codec=CompactCodec(), ragged=False)


def get_scratch(stream: RecordStream) -> RowGroupScratch:
    scratch = stream._reader.scratch
    assert scratch is not None
    return scratch


def get_statistics(stream: RecordStream) -> ScratchStatistics:
    assert stream.scratch_statistics is not None
    return stream.scratch_statistics


def read_both(
    source: Any, settings: ScratchSettings, meanwhile: Callable[[RecordStream], None] | None = None, **options: Any
) -> ScratchStatistics:
    """Hold the batches of three epochs with a scratch to those without, and do something after the first epoch."""
    options = {"global_batch_sequences": 4, "seed": 3, **TIGHT, **options}
    plain, kept = RecordStream(source, **options), RecordStream(source, scratch=settings, **options)
    for step in range(EPOCHS * plain.steps_per_epoch):
        if meanwhile is not None and step == plain.steps_per_epoch:
            meanwhile(kept)
        check_batches_are_equal(next(kept), next(plain))
    plain.close()
    kept.close()
    return get_statistics(kept)


def build_source(kind: str, build_store: BuildStore, tmp_path: Path) -> Any:
    def build(name: str, **options: Any) -> LogitStore:
        return build_store(str(tmp_path / name), num_units=2, records_per_unit=11, **options)

    even: dict[str, Any] = {"codec": CompactCodec(), "ragged": False}
    if kind == "float32":
        return build("store")
    if kind == "drawn":
        return build("store", method=SampleMethod(num_draws=8))
    if kind == "mixture":
        return [StreamSource(build(name, seed=seed, **even), name=name) for seed, name in enumerate("ab")]
    if kind == "subset":
        store = build("store", **even)
        return [StreamSource(store, subset=choose_records(store))]
    if kind == "aligned":
        return AlignedStores([build(name, **even) for name in "ab"])
    return build("store", **even)


@pytest.mark.parametrize("kind", ["compact", "documents", "float32", "drawn", "mixture", "subset", "aligned"])
def test_batches_are_those_without_a_scratch(
    build_store: BuildStore, tmp_path: Path, settings: ScratchSettings, kind: str
) -> None:
    source = build_source(kind, build_store, tmp_path)
    found = read_both(source, settings, with_documents=kind == "documents")
    assert found.kept > 0
    assert found.read > found.kept
    assert found.damaged == 0
    assert list(Path(settings.folder).iterdir()) == []


def test_row_group_of_more_arrays_than_the_system_writes_at_once_is_kept(
    store: LogitStore, settings: ScratchSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_both(store, settings)
    monkeypatch.setattr("logitstore.stream.scratch._MOST_PARTS", 3)
    found = read_both(store, settings)
    assert found.read > found.kept  # how often exactly, threads that read ahead decide
    assert (found.kept, found.file_bytes, found.damaged) == (whole.kept, whole.file_bytes, 0)


def test_store_is_read_once(store: LogitStore, settings: ScratchSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    read_packed_row_group = LogitStore.read_packed_row_group

    def count(self: LogitStore, row_group: int, **options: Any) -> Any:
        read.append(row_group)
        return read_packed_row_group(self, row_group, **options)

    monkeypatch.setattr(LogitStore, "read_packed_row_group", count)
    reader = SourceReader([StreamSource(store)], with_documents=False, scratch=settings)
    for _ in range(EPOCHS):
        for row_group in range(store.num_row_groups):
            reader.read_packed(row_group)
    assert read == list(range(store.num_row_groups))


def test_scratch_that_is_too_small_for_the_store_keeps_what_has_room(
    store: LogitStore, settings: ScratchSettings
) -> None:
    whole = read_both(store, settings)
    for share in (2, 50):
        max_bytes = whole.file_bytes // share
        found = read_both(store, settings.model_copy(update={"max_bytes": max_bytes}))
        assert found.file_bytes <= max_bytes
        assert found.kept < whole.kept
        assert (found.kept > 0) == (share == 2)


def flip_a_byte(stream: RecordStream) -> None:
    """In the arrays of every row group that was kept."""
    scratch = get_scratch(stream)
    for block in list(scratch._blocks.values()):
        at = block.offset + block.num_bytes - 100
        (before,) = os.pread(scratch._file, 1, at)
        os.pwrite(scratch._file, bytes([before ^ 1]), at)


def flip_a_byte_of_the_head(stream: RecordStream) -> None:
    scratch = get_scratch(stream)
    for block in list(scratch._blocks.values()):
        os.pwrite(scratch._file, b"\xff", block.offset + 5)


def cut_off_the_file(stream: RecordStream) -> None:
    os.ftruncate(get_scratch(stream)._file, 1000)


@pytest.mark.parametrize("damage", [flip_a_byte, flip_a_byte_of_the_head, cut_off_the_file])
def test_what_is_damaged_is_read_from_the_store(
    store: LogitStore, settings: ScratchSettings, damage: Callable[[RecordStream], None], caplog: Any
) -> None:
    found = read_both(store, settings, damage)
    assert found.damaged > 0
    assert found.kept > 0  # again
    assert "is read anew: " in caplog.text


def test_full_disk_costs_one_warning(store: LogitStore, settings: ScratchSettings, caplog: Any) -> None:
    whole = read_both(store, settings)
    with files_of_at_most(whole.file_bytes // 2), caplog.at_level(logging.WARNING):
        found = read_both(store, settings)
    assert 0 < found.kept < whole.kept
    assert found.file_bytes <= whole.file_bytes // 2
    assert [record.message.count("no more row groups are kept there") for record in caplog.records] == [1]


def test_folder_that_cannot_be_written_to_is_refused(store: LogitStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = ScratchSettings(folder=str(tmp_path / "file"), max_bytes=1 << 20)
    with pytest.raises(ConfigError, match=r"scratch: expected a folder that can be written to, found .*file: .*; name"):
        RecordStream(store, global_batch_sequences=4, scratch=settings)


def test_missing_xxhash_is_named(store: LogitStore, settings: ScratchSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(ConfigError, match=r"expected the package xxhash, .* run 'pip install logitstore\[fast\]'"):
        RecordStream(store, global_batch_sequences=4, scratch=settings)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_fork_has_a_file_of_its_own(store: LogitStore, settings: ScratchSettings) -> None:
    options: dict[str, Any] = {"global_batch_sequences": 4, "scratch": settings, **TIGHT}
    whole = take_addresses(RecordStream(store, **options), 40)
    stream = RecordStream(store, **options)
    assert take_addresses(stream, 5) == whole[:5]
    assert get_statistics(stream).kept > 0
    file_of_parent = os.fstat(get_scratch(stream)._file).st_ino
    pid = os.fork()
    if pid == 0:
        is_right = take_addresses(stream, 35) == whole[5:]
        found = get_statistics(stream)
        has_own = os.fstat(get_scratch(stream)._file).st_ino != file_of_parent
        os._exit(0 if is_right and has_own and found.kept > 0 and found.damaged == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert take_addresses(stream, 35) == whole[5:]
    assert get_statistics(stream).damaged == 0
    stream.close()


def test_stream_that_is_pickled_keeps_its_scratch(store: LogitStore, settings: ScratchSettings) -> None:
    whole = take_addresses(RecordStream(store, global_batch_sequences=4), 20)
    stream = RecordStream(store, global_batch_sequences=4, scratch=settings)
    assert take_addresses(stream, 5) == whole[:5]
    copy = pickle.loads(pickle.dumps(stream))
    stream.close()
    assert take_addresses(copy, 15) == whole[5:]
    assert get_statistics(copy).kept > 0
    copy.close()


def test_file_is_gone_with_the_stream(store: LogitStore, settings: ScratchSettings) -> None:
    def count_open_files() -> int:
        links = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
        return sum(settings.folder in link for link in links)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("there is no list of open files here")
    stream = RecordStream(store, global_batch_sequences=4, scratch=settings)
    take_addresses(stream, 5)
    assert count_open_files() == 1
    stream.close()
    reading = [thread for thread in threading.enumerate() if thread.name.startswith("logitstore-stream")]
    for thread in reading:
        thread.join(60)
    del stream
    assert count_open_files() == 0


def test_threads_find_what_any_of_them_kept(store: LogitStore, settings: ScratchSettings) -> None:
    reader = SourceReader([StreamSource(store)], with_documents=False, scratch=settings)
    expected = [reader.read(row_group) for row_group in range(store.num_row_groups)]
    wrong: list[int] = []

    def read(seed: int) -> None:
        for row_group in np.random.default_rng(seed).integers(store.num_row_groups, size=200).tolist():
            found = reader.join([(reader.read_packed(row_group), 0)])
            wanted = expected[row_group].slice(0, 1)
            if not np.array_equal(found.support_logprobs, wanted.support_logprobs):
                wrong.append(row_group)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert reader.scratch is not None
    assert reader.scratch.statistics.kept == store.num_row_groups
