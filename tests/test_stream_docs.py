"""What docs/stream.md says: its settings load, its Python runs, it leaves no setting out."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from checkout import ROOT

from logitstore.store.logit_store import LogitStore
from logitstore.stream.cache import CacheSettings
from logitstore.stream.iterator import RecordStream
from logitstore.stream.scratch import ScratchSettings
from logitstore.stream.torch_dataset import RecordDataset
from trainer.config import TrainSettings
from trainer.stream_config import FurtherCorpusSettings, StreamSettings

PAGE = (ROOT / "docs/stream.md").read_text(encoding="utf-8")
YAML = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def run_block(
    build_store: Callable[..., LogitStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], dict[str, object]]:
    """Function that runs the one Python block that a text stands in, in a folder with stores."""
    for name in ("quickstart", "docs", "code"):
        build_store(str(tmp_path / "runs" / name / "store"))
    monkeypatch.chdir(tmp_path)

    def run(text: str) -> dict[str, object]:
        (block,) = [block for block in PYTHON if text in block]
        names: dict[str, object] = {}
        exec(block.replace("/nvme", str(tmp_path)), names)
        return names

    return run


def test_python_that_reads_a_store_stops_after_three_steps(
    run_block: Callable[[str], dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    stream = run_block("# without end")["stream"]
    assert isinstance(stream, RecordStream)
    assert stream.step == 3
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2", "3"]


def test_python_that_mixes_stores_goes_on_with_other_weights(run_block: Callable[[str], dict[str, object]]) -> None:
    stream = run_block("StreamSource(")["stream"]
    assert isinstance(stream, RecordStream)
    assert stream.step == 1
    assert [source.weight for source in stream.sources] == [0.5, 0.5]
    assert len(next(stream)) == 32


def test_python_that_keeps_a_cache_keeps_row_groups_in_it(run_block: Callable[[str], dict[str, object]]) -> None:
    store = run_block("RowGroupCache(")["store"]
    assert isinstance(store, LogitStore)
    store.read_row_group(0)
    assert any(path.is_file() for path in Path("logitstore").rglob("*"))


def test_python_that_has_a_scratch_says_what_is_in_it(
    run_block: Callable[[str], dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xxhash")
    stream = run_block("ScratchSettings(")["stream"]
    assert isinstance(stream, RecordStream)
    assert re.fullmatch(r"ScratchStatistics\(kept=[1-9]\d*, .*damaged=0\)\n", capsys.readouterr().out)
    stream.close()


@pytest.mark.parametrize("block", YAML)
def test_settings_of_the_page_are_valid(block: str) -> None:
    least = {"store": "s", "student": {"model": "m"}, "global_batch_sequences": 1, "steps": 1, "output": "o"}
    TrainSettings.model_validate({**least, **yaml.safe_load(block)})


def test_page_names_every_argument_and_every_default() -> None:
    section = PAGE.partition("## Settings")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|([^|]*)\|", section, re.MULTILINE))
    named = {name for names in rows for name in re.findall(r"\w+", names)}
    arguments = inspect.signature(RecordStream).parameters
    assert named == set(arguments) - {"store"}
    assert set(inspect.signature(RecordDataset).parameters) == {"store", "steps", "collate", "stream_options"}
    for names, default in rows.items():
        for name, value in zip(re.findall(r"\w+", names), default.split(", "), strict=False):
            found = arguments[name].default
            if found is not None and found is not inspect.Parameter.empty:
                assert eval(value.strip(" `")) == found, name


def test_page_names_every_setting_of_a_run_that_is_about_the_stream() -> None:
    settings = {
        *StreamSettings.model_fields,
        *CacheSettings.model_fields,
        *ScratchSettings.model_fields,
        *FurtherCorpusSettings.model_fields,
    }
    run = {
        "micro_batch_sequences",
        "micro_batch_tokens",
        "pack_sequences",
        "support_slots",
        "where",
        "skip_steps",
        "cache",
        "scratch",
    }
    assert run <= set(TrainSettings.model_fields)
    for name in (settings | run) - {"manifest"}:
        assert re.search(rf"\b{name}\b", PAGE), name


def test_every_block_of_the_page_is_run() -> None:
    assert len(PYTHON) == PAGE.count("```python") == 4
    assert len(YAML) == PAGE.count("```yaml")
