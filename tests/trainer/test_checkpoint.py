"""Checkpoints are there as a whole or not at all."""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from logitstore.errors import OutsideError, TrainingError
from trainer import checkpoint
from trainer.checkpoint import (
    CheckpointHeader,
    check_same_run,
    find_latest_checkpoint,
    load_state,
    read_header,
    save_checkpoint,
)
from trainer.distributed import Processes
from trainer.sharded_state import write_state

ALONE = Processes(rank=0, world_size=1, device=torch.device("cpu"))


def build_header(step: int) -> CheckpointHeader:
    return CheckpointHeader(
        step=step,
        positions=10 * step,
        manifest_number=1,
        stream={"step": step, "fingerprint": "f"},
        identity={"seed": 0},
    )


def build_trained(seed: int) -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
    torch.manual_seed(seed)
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return module, [optimizer]


def test_checkpoint_read_back_is_what_was_saved(tmp_path: Path) -> None:
    module, optimizers = build_trained(seed=0)
    path = save_checkpoint(tmp_path, build_header(20), module, optimizers, ALONE, keep=2)
    assert path.name == "step-000020"
    assert read_header(path) == build_header(20)
    other, others = build_trained(seed=1)
    load_state(path, other, others, ALONE)
    assert torch.equal(other.weight, module.weight)
    for mine, theirs in zip(optimizers[0].state.values(), others[0].state.values(), strict=True):
        assert mine.keys() == theirs.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_checkpoint_of_several_optimizers_and_of_weights_without_state_is_what_was_saved(tmp_path: Path) -> None:
    """A tied weight, one that never had a gradient, one of bfloat16, and state that is a plain number."""

    def build(seed: int) -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
        torch.manual_seed(seed)
        module = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5), torch.nn.Linear(5, 2).bfloat16())
        module[1].weight = module[0].weight
        module.unused = torch.nn.Linear(2, 2)
        module.register_buffer("seen", torch.full((2,), float(seed)))
        last = [*module[2].parameters()]
        rest = [parameter for parameter in module.parameters() if all(parameter is not other for other in last)]
        return module, [torch.optim.AdamW(rest), torch.optim.SGD(last, momentum=0.9)]

    module, optimizers = build(0)
    module[2](module[1](module[0](torch.tensor([1]))).bfloat16()).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    optimizers[1].state[module[2].bias].update(count=2**40 + 1, rate=0.1)
    path = save_checkpoint(tmp_path, build_header(1), module, optimizers, ALONE, keep=1)
    other, others = build(1)
    others[0].state[other.unused.weight]["exp_avg"] = torch.ones(2, 2)
    load_state(path, other, others, ALONE)
    assert other[1].weight is other[0].weight
    for name, value in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    for mine, theirs in zip(optimizers, others, strict=True):
        assert len(mine.state) == len(theirs.state) > 0
        assert str(mine.state_dict()["state"]) == str(theirs.state_dict()["state"])
    assert others[1].state[other[2].bias]["count"] == 2**40 + 1
    assert others[1].state[other[2].bias]["rate"] == 0.1  # as exact as it was
    assert others[1].state[other[2].bias]["momentum_buffer"].dtype == torch.bfloat16


def test_checkpoints_beyond_those_kept_are_deleted_oldest_first(tmp_path: Path) -> None:
    trained = build_trained(seed=0)
    for step in (5, 10, 15, 20):
        save_checkpoint(tmp_path, build_header(step), *trained, ALONE, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000015", "step-000020"]


@pytest.mark.parametrize("failing", ["trainer.sharded_state.save", "os.fsync", "json.dump", "pathlib.Path.replace"])
def test_checkpoint_killed_while_writing_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    trained = build_trained(seed=0)
    earlier = save_checkpoint(tmp_path, build_header(5), *trained, ALONE, keep=1)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(failing, fail)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, build_header(10), *trained, ALONE, keep=1)
    assert find_latest_checkpoint(tmp_path) == earlier
    assert read_header(earlier) == build_header(5)
    # The next attempt clears what the killed one left.
    latest = save_checkpoint(tmp_path, build_header(10), *trained, ALONE, keep=1)
    assert list(tmp_path.iterdir()) == [latest]


@pytest.mark.parametrize("in_the_way", ["a file", "the limit of the disk"])
def test_checkpoint_that_cannot_be_written_says_what_to_do(tmp_path: Path, in_the_way: str) -> None:
    """As trouble from outside: the run goes on from the newest checkpoint when there is room again."""
    trained = build_trained(seed=0)
    folder, limits = tmp_path / "checkpoints", resource.getrlimit(resource.RLIMIT_FSIZE)
    if in_the_way == "a file":
        folder.touch()
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(
            OutsideError, match=r"(?s)checkpoints.*: expected .* found .*; look to room and permissions"
        ):
            save_checkpoint(folder, build_header(5), *trained, ALONE, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert find_latest_checkpoint(folder) is None
    if in_the_way == "a file":
        folder.unlink()
    else:
        assert list(folder.iterdir()) == []  # what was written of it would take the room that others need
    assert save_checkpoint(folder, build_header(5), *trained, ALONE, keep=1).name == "step-000005"


def test_checkpoint_whose_deletion_is_killed_is_gone_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = build_trained(seed=0)
    save_checkpoint(tmp_path, build_header(5), *trained, ALONE, keep=1)

    def die(folder: Path) -> None:
        (folder / "checkpoint.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, build_header(10), *trained, ALONE, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-000005.tmp", "step-000010"]
    save_checkpoint(tmp_path, build_header(15), *trained, ALONE, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000015"]


def test_checkpoint_of_which_a_file_is_not_to_be_seen_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(folder: Path, *state: Any) -> None:
        write_state(folder, *state)
        (folder / "__0_0.distcp").unlink()

    monkeypatch.setattr("trainer.checkpoint.write_state", lose)
    with pytest.raises(TrainingError, match=r"found no __0_0\.distcp; give processes on several machines"):
        save_checkpoint(tmp_path, build_header(5), *build_trained(seed=0), ALONE, keep=1)
    assert find_latest_checkpoint(tmp_path) is None


@dataclass(frozen=True, kw_only=True)
class SecondRank(Processes):
    """Of a run whose first rank does not see the second one's file."""

    def join_texts(self, texts: Sequence[str]) -> list[str]:
        assert not texts
        return ["__1_0.distcp"]


def test_rank_whose_file_the_first_does_not_see_fails_with_it(tmp_path: Path) -> None:
    """Or it would wait for the first one, which may have gone on to another run of a sweep."""
    second = SecondRank(rank=1, world_size=1, device=torch.device("cpu"))
    with pytest.raises(TrainingError, match=r"found no __1_0\.distcp; give"):
        save_checkpoint(tmp_path, build_header(5), *build_trained(seed=0), second, keep=1)


def test_latest_checkpoint_ignores_folders_that_are_none(tmp_path: Path) -> None:
    assert find_latest_checkpoint(tmp_path / "not there") is None
    path = save_checkpoint(tmp_path, build_header(999_999), *build_trained(seed=0), ALONE, keep=2)
    (tmp_path / "step-2000000").mkdir()  # no header in it
    (tmp_path / "step-latest").mkdir()
    (tmp_path / ".step-3000000.tmp").mkdir()
    assert find_latest_checkpoint(tmp_path) == path
    longer = save_checkpoint(tmp_path, build_header(1_000_000), *build_trained(seed=0), ALONE, keep=2)
    assert find_latest_checkpoint(tmp_path) == longer


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "digests.json", "checkpoint.json"])
@pytest.mark.parametrize("length", [0, 100, None])
def test_damaged_checkpoint_says_which_folder_to_delete(tmp_path: Path, name: str, length: int | None) -> None:
    """Of a file that is cut short, and of one that is gone."""
    module, optimizers = build_trained(seed=0)
    path = save_checkpoint(tmp_path, build_header(5), module, optimizers, ALONE, keep=2)
    damaged = path / name
    data = damaged.read_bytes()
    damaged.unlink()
    if length is not None:
        damaged.write_bytes(data[:length])
    read = read_header if name == "checkpoint.json" else lambda path: load_state(path, module, optimizers, ALONE)
    with pytest.raises(TrainingError, match=f"delete {path} to go on"):
        read(path)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "digests.json"])
def test_flipped_bit_is_noticed_before_anything_is_read(tmp_path: Path, name: str) -> None:
    trained = build_trained(seed=0)
    path = save_checkpoint(tmp_path, build_header(5), *trained, ALONE, keep=1)
    before = {key: value.clone() for key, value in trained[0].state_dict().items()}
    data = (path / name).read_bytes()
    for at in range(0, len(data), max(1, len(data) // 50)):
        (path / name).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(TrainingError, match=f"(?s){path}.*delete {path} to go on"):
            load_state(path, *trained, ALONE)
    assert all(torch.equal(before[key], value) for key, value in trained[0].state_dict().items())
    (path / name).write_bytes(data)
    load_state(path, *trained, ALONE)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_each_file_is_held_to_its_digest_by_one_of_the_ranks(tmp_path: Path, name: str) -> None:
    path = save_checkpoint(tmp_path, build_header(5), *build_trained(seed=0), ALONE, keep=1)
    with (path / name).open("ab") as file:
        file.write(b"more")
    failed = 0
    for rank in range(3):
        try:
            checkpoint._check_digests(path, replace(ALONE, rank=rank, world_size=3))
        except TrainingError:
            failed += 1
    assert failed == 1


def test_file_without_a_digest_is_refused(tmp_path: Path) -> None:
    trained = build_trained(seed=0)
    path = save_checkpoint(tmp_path, build_header(5), *trained, ALONE, keep=1)
    (path / "digests.json").write_text("{}")
    with pytest.raises(TrainingError, match=r"__0_0.distcp|\.metadata: expected bytes of SHA-256 \(none\), found"):
        load_state(path, *trained, ALONE)


@pytest.mark.parametrize(
    "change", [{"step": "5"}, {"step": -5}, {"stream": []}, {"identity": None}, {"further_manifests": 1}, {"more": 1}]
)
def test_header_of_other_types_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = save_checkpoint(tmp_path, build_header(5), *build_trained(seed=0), ALONE, keep=1)
    values = json.loads((path / "checkpoint.json").read_text("utf-8"))
    (path / "checkpoint.json").write_text(json.dumps({**values, **change}))
    [name] = change
    with pytest.raises(TrainingError, match=f"(?s)expected a checkpoint, found .*{name}.*delete {path} to go"):
        read_header(path)


def test_checkpoint_whose_list_of_tensors_names_what_there_is_not_is_damaged(tmp_path: Path) -> None:
    """A bit of a pickle is another module's name, and anything may come of it."""
    trained = build_trained(seed=0)
    path = save_checkpoint(tmp_path, build_header(5), *trained, ALONE, keep=1)
    (path / ".metadata").write_bytes(metadata := b"cno_such_module\nMetadata\n.")
    digests = json.loads((path / "digests.json").read_text("utf-8"))
    (path / "digests.json").write_text(json.dumps({**digests, ".metadata": hashlib.sha256(metadata).hexdigest()}))
    with pytest.raises(TrainingError, match=r"(?s)cannot be read: ModuleNotFoundError.*delete .* to go on"):
        load_state(path, *trained, ALONE)


def test_checkpoint_of_an_earlier_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "step-000005"
    path.mkdir()
    (path / "state.pt").write_bytes(b"weights")
    header = {"step": 5, "positions": 50, "manifest_number": 1, "stream": {}, "identity": {}}
    (path / "checkpoint.json").write_text(json.dumps(header), encoding="utf-8")
    assert find_latest_checkpoint(tmp_path) == path
    with pytest.raises(TrainingError, match=r"expected a checkpoint of format 3, found one of format 1.*finish"):
        read_header(path)


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, build_header(5), *build_trained(seed=0), ALONE, keep=2)
    wider = torch.nn.Linear(4, 2)
    with pytest.raises(TrainingError, match=r"(?s)[Ss]ize mismatch.*delete"):
        load_state(path, wider, [torch.optim.AdamW(wider.parameters())], ALONE)
    without = torch.nn.Linear(3, 2, bias=False)
    with pytest.raises(TrainingError, match=r"only in checkpoint: student.bias\n  only in student:    \(none\)"):
        load_state(path, without, [torch.optim.AdamW(without.parameters())], ALONE)


def test_checkpoint_of_another_run_prints_both_values_of_what_differs() -> None:
    there = {"seed": 0, "loss.weight": 0.8, "gone": 1, "betas": [0.9, 0.95]}
    here = {"seed": 16, "loss.weight": 0.8, "new": 2, "betas": (0.9, 0.95)}
    with pytest.raises(TrainingError) as raised:
        check_same_run(Path("run/step-000005"), there, here)
    message = str(raised.value)
    assert "seed\n    in checkpoint: 0\n    in this run:   16" in message
    assert "gone\n    in checkpoint: 1\n    in this run:   (nothing)" in message
    assert "new\n    in checkpoint: (nothing)\n    in this run:   2" in message
    assert "weight" not in message
    assert "betas" not in message


def test_setting_that_is_off_is_as_good_as_one_that_is_not_there() -> None:
    """A checkpoint written before there was such a setting."""
    check_same_run(Path("run"), {"seed": 1, "gone": None}, {"seed": 1, "new": None})
    with pytest.raises(TrainingError, match=r"new\n    in checkpoint: \(nothing\)\n    in this run:   0"):
        check_same_run(Path("run"), {"seed": 1}, {"seed": 1, "new": 0})
