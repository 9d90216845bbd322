"""What docs/frameworks.md shows, done: the same records and the same weights, whoever's loop it is."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from unittest import mock

import pytest
import torch
from checkout import ROOT
from framework_ranks import Case, Shown, Weights, run_python, watch
from stream_processes import take_addresses
from taught_stores import build_model, fill_store
from tiny_models import train_tokenizer

from cluster.connection import connect
from logitstore.records import RecordBatch
from logitstore.store.logit_store import LogitStore
from logitstore.stream.iterator import RecordStream
from logitstore.stream.source import StreamSource
from trainer.batch import TrainBatch
from trainer.data import collate

PAGE = (ROOT / "docs/frameworks.md").read_text(encoding="utf-8")
PYTHON = dict(re.findall(r"^## (.*?)\n(?:(?!^## ).)*?```python\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL))
# By heading: what it needs, the package to look for, and items of a step.
LOOPS = {
    "torch.distributed.checkpoint": ("torch", 1),
    "Accelerate": ("accelerate", 1),
    "Trainer of transformers": ("accelerate", 2),
    "SFTTrainer of TRL": ("trl", 2),
    "Lightning": ("lightning", 1),
}
TRAINERS = {"Trainer of transformers": "runs/trainer", "SFTTrainer of TRL": "runs/sft"}
STEPS, HALF, BATCH = 4, 2, 8
# Nobody looks at it, and it would take time.
QUIET = "logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False"
# What frameworks say of themselves and of each other, and of fork in a process with threads.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.slow,
]


@pytest.fixture(autouse=True, scope="module")
def _count_no_users() -> Iterator[None]:
    """TRL tells a server about every trainer that is made, but for those of tests that say so."""
    with mock.patch.dict(os.environ, {"CI": "1"}):
        yield


def is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def skip_without(package: str) -> None:
    if not is_there(package):
        pytest.skip(f"{package} is not installed: pip install '.[dev]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, and a store of another model's signals."""
    folder = tmp_path_factory.mktemp("frameworks")
    fill_store(folder, build_model(0), range(4))
    build_model(1).save_pretrained(folder / "student")
    train_tokenizer().save_pretrained(folder / "student")  # SFTTrainer wants one, and nothing of it
    return folder


@pytest.fixture(scope="module")
def store(folder: Path) -> LogitStore:
    return LogitStore.open(str(folder / "store"))


@pytest.fixture(scope="module")
def batches(store: LogitStore) -> Shown:
    """The global batches, as one process streams them."""
    return take_addresses(RecordStream(store, global_batch_sequences=BATCH), 2 * STEPS)


def prepare(name: str, folder: Path, *, steps: int = STEPS, num_processes: int = 1) -> str:
    """A block of the page, for a store and student of the test's and few steps."""
    changes = {
        '"runs/quickstart/store"': repr(str(folder / "store")),
        '"runs/quickstart/distilled/student"': repr(str(folder / "student")),
        "global_batch_sequences=32": f"global_batch_sequences={BATCH}",
        "steps = 1000": f"steps = {steps}",
        "steps, output = 1000": f"steps, output = {steps}",
        "steps, checkpoint = 1000": f"steps, checkpoint = {steps}",
        "max_steps=1000": f"max_steps={steps}",
        "save_steps=500": f"save_steps={HALF}",
        '"steps": 1000, "save_steps": 500': f'"steps": {steps}, "save_steps": {HALF}',
        'devices="auto"': f'devices={num_processes}, accelerator="cpu", {QUIET}',
    }
    code = PYTHON[name]
    for old, new in changes.items():
        code = code.replace(old, new)
    assert "1000" not in code
    return code


@pytest.fixture(scope="module")
def two_processes(folder: Path) -> Path:
    """Folder with what two processes did together with every block: all steps, and half of them."""
    cases = []
    for name, (package, _) in LOOPS.items():
        if is_there(package):
            for kind, steps in {"whole": STEPS, "half": HALF}.items():
                if (name, kind) not in ((trainer, "half") for trainer in TRAINERS):  # which write one half-way
                    code = prepare(name, folder, steps=steps, num_processes=2)
                    cases.append(Case(f"{name} {kind}", code, str(folder / f"{name} {kind}")))
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]), encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "tests/framework_ranks.py"), str(folder / "cases.json"), str(folder / "store"), str(folder)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launcher, *script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    for name, output in TRAINERS.items():
        if is_there(LOOPS[name][0]):
            shutil.copytree(folder / f"{name} whole", folder / f"{name} half")
            shutil.rmtree(folder / f"{name} half" / output / f"checkpoint-{STEPS}")
    return folder


def read_ranks(folder: Path, case: str) -> tuple[list[Shown], list[Weights]]:
    files = [folder / f"{case}-rank{rank}" for rank in range(2)]
    shown = [json.loads(Path(f"{file}.json").read_text(encoding="utf-8")) for file in files]
    return shown, [torch.load(f"{file}.pt", weights_only=True) for file in files]


def join_items(shown: Shown, items_per_step: int) -> Shown:
    return [list(chain(*shown[i : i + items_per_step])) for i in range(0, len(shown), items_per_step)]


@pytest.mark.parametrize("name", LOOPS)
def test_two_processes_show_their_students_the_global_batches(name: str, two_processes: Path, batches: Shown) -> None:
    package, items_per_step = LOOPS[name]
    skip_without(package)
    shown, weights = read_ranks(two_processes, f"{name} whole")
    parts = [join_items(one, items_per_step) for one in shown]
    assert [first + second for first, second in zip(*parts, strict=True)] == batches[:STEPS]
    for key, weight in weights[0].items():
        assert torch.equal(weight, weights[1][key]), key


@pytest.mark.parametrize("name", LOOPS)
def test_one_process_goes_on_where_two_were_as_if_they_had_never_stopped(
    name: str, two_processes: Path, store: LogitStore, batches: Shown
) -> None:
    package, items_per_step = LOOPS[name]
    skip_without(package)
    case = Case(name, prepare(name, two_processes), str(two_processes / f"{name} half"))
    shown, weights = case.run(store)
    assert join_items(shown, items_per_step) == batches[HALF:STEPS]
    _, (whole, _) = read_ranks(two_processes, f"{name} whole")
    for key, weight in weights.items():
        torch.testing.assert_close(weight, whole[key], rtol=0, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", LOOPS)
def test_block_that_is_run_again_after_its_last_step_changes_nothing(
    name: str, two_processes: Path, store: LogitStore
) -> None:
    skip_without(LOOPS[name][0])
    shown, weights = Case(name, prepare(name, two_processes), str(two_processes / f"{name} whole")).run(store)
    assert shown == []
    _, (whole, _) = read_ranks(two_processes, f"{name} whole")
    for key, weight in weights.items():
        assert torch.equal(weight, whole[key]), key


def test_ray_train_starts_workers_anew_at_the_last_checkpoint(
    folder: Path, tmp_path: Path, batches: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without("ray")
    import framework_ranks
    from ray import cloudpickle

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code = prepare("Ray Train", folder).replace("    teach,\n", "    watch(teach),\n")
    cloudpickle.register_pickle_by_value(framework_ranks)
    try:
        with connect(None, num_cpus=2):
            [result] = run_python(code, "result", watch=lambda loop: watch(loop, str(folder / "store"), tmp_path))
    finally:
        cloudpickle.unregister_pickle_by_value(framework_ranks)
    assert result.metrics["step"] == STEPS
    ranks = []
    for rank in range(2):
        files = sorted(tmp_path.glob(f"shown-{rank}-*.json"), key=lambda path: path.stat().st_mtime)
        before, after = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        assert len(before) <= 3
        ranks.append((before[:2], after))
    assert [first + second for first, second in zip(ranks[0][0], ranks[1][0], strict=True)] == batches[:HALF]
    assert [first + second for first, second in zip(ranks[0][1], ranks[1][1], strict=True)] == batches[HALF:STEPS]


def assert_same(found: TrainBatch, expected: RecordBatch) -> None:
    for one, other in zip(found.iterate_tensors(), collate(expected).iterate_tensors(), strict=True):
        assert torch.equal(one, other)


def read_items(stream: RecordStream, steps: int) -> list[RecordBatch]:
    """What two workers deliver."""
    return [half for _ in range(steps) for batch in [next(stream)] for half in (batch.slice(0, 4), batch.slice(4, 8))]


def test_dataloader_of_the_page_delivers_every_step_in_items_of_its_workers(folder: Path, store: LogitStore) -> None:
    code = prepare("PyTorch's DataLoader", folder).replace("...  # forward", "seen.append(batch)  # forward")
    seen: list[TrainBatch] = []
    [state] = run_python(code, "state", seen=seen)
    stream = RecordStream(store, global_batch_sequences=BATCH)
    for found, expected in zip(seen, read_items(stream, STEPS), strict=True):
        assert_same(found, expected)
    assert state == stream.state_dict()


def test_stateful_dataloader_of_the_page_goes_on_in_the_middle_of_a_step(folder: Path, store: LogitStore) -> None:
    skip_without("torchdata")
    code = prepare("torchdata's StatefulDataLoader", folder)
    taken, following, again = run_python(code, "taken", "following", "again")
    items = read_items(RecordStream(store, global_batch_sequences=BATCH), 4)
    for found, expected in zip(taken + following + again, items + items[5:], strict=True):
        assert_same(found, expected)


def test_checkpoint_of_torch_keeps_the_position_of_a_mixture(store: LogitStore, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    def build(weight: float) -> RecordStream:
        sources = [StreamSource(store, name="one"), StreamSource(store, weight=weight, name="other")]
        return RecordStream(sources, global_batch_sequences=BATCH)

    stream, restored, expected = build(0.5), build(0.25), build(0.25)
    take_addresses(stream, 3)
    dcp.save({"stream": stream}, checkpoint_id=tmp_path / "checkpoint")
    dcp.load({"stream": restored}, checkpoint_id=tmp_path / "checkpoint")
    expected.load_state_dict(stream.state_dict())
    assert restored.step == 3
    assert take_addresses(restored, 3) == take_addresses(expected, 3)


def test_every_block_of_the_page_is_run() -> None:
    assert len(PYTHON) == PAGE.count("```python") == len(LOOPS) + 3
    for heading in (*LOOPS, "PyTorch's DataLoader", "torchdata's StatefulDataLoader", "Ray Train"):
        assert heading in PYTHON
