"""What a sweep file may say, and the runs that come of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from logitstore.errors import ConfigError
from trainer.sweep.plan import describe_collation, group_runs
from trainer.sweep.record import RunResult
from trainer.sweep.results import compute_gaps, compute_means, write_csv
from trainer.sweep.settings import Sweep, read_sweep

COMMON: dict[str, Any] = {"store": "s", "global_batch_sequences": 8, "steps": 10, "output": "runs/sweep"}
Read = Callable[..., Sweep]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Function that reads a sweep of the common settings and some more, with overrides."""

    def read_it(*overrides: str, **values: object) -> Sweep:
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**COMMON, **values}), encoding="utf-8")
        return read_sweep(path, overrides)

    return read_it


def test_runs_are_all_combinations_in_order_and_have_folders_of_their_own(read: Read) -> None:
    axes = {"rate": {"high": {"optimizer": {"learning_rate": 1e-2}}, "low": {"optimizer": {"learning_rate": 1e-4}}}}
    sweep = read(
        "optimizer.gradient_clip=0.5",
        students={"a": {"model": "m/a"}, "b": {"model": "m/b"}},
        losses={"kl": {"kind": "bucket_kl", "weight": 0.5}},
        seeds=[3, 4],
        axes=axes,
    )
    names = [f"{a}-kl-{rate}-seed{seed}" for a in "ab" for rate in ("high", "low") for seed in (3, 4)]
    assert [run.name for run in sweep.runs] == names
    last = sweep.runs[-1]
    assert last.labels == {"student": "b", "loss": "kl", "rate": "low", "seed": "4"}
    assert (last.settings.student.model, last.settings.loss.weight, last.settings.seed) == ("m/b", 0.5, 4)
    assert (last.settings.optimizer.learning_rate, last.settings.optimizer.gradient_clip) == (1e-4, 0.5)
    assert last.settings.output == "runs/sweep/b-kl-low-seed4"


def test_seeds_share_the_order_unless_the_file_says_otherwise(read: Read) -> None:
    def list_seeds(**values: object) -> list[tuple[int, int | None]]:
        runs = read(student={"model": "m"}, seeds=[0, 5], **values).runs
        return [(run.settings.seed, run.settings.order_seed) for run in runs]

    assert list_seeds() == [(0, None), (5, 0)]
    assert list_seeds(order_seed=9) == [(0, 9), (5, 9)]
    assert list_seeds(order_seed=None) == [(0, None), (5, None)]


def test_sweep_from_a_train_file_changes_keys_of_its_sections_and_replaces_students(read: Read, tmp_path: Path) -> None:
    train = {**COMMON, "student": {"config": {"model_type": "llama"}}, "optimizer": {"weight_decay": 0.2}, "seed": 7}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(train), encoding="utf-8")
    sweep = read(train="train.yaml", students={"a": {"model": "m"}}, seeds=[1], optimizer={"learning_rate": 0.5})
    [run] = sweep.runs
    assert (run.settings.student.model, run.settings.student.config) == ("m", None)
    assert (run.settings.optimizer.weight_decay, run.settings.optimizer.learning_rate) == (0.2, 0.5)
    assert run.settings.order_seed == 7


def test_listed_runs_name_students_and_are_told_apart_by_what_differs(read: Read) -> None:
    sweep = read(
        students={"a": {"model": "m/a"}, "b": {"model": "m/b"}},
        runs=[
            {"name": "one", "student": "a", "optimizer": {"learning_rate": 0.1}},
            {"name": "two", "student": "b", "seed": 1},
        ],
    )
    assert [run.settings.student.model for run in sweep.runs] == ["m/a", "m/b"]
    assert [dict(run.labels) for run in sweep.runs] == [
        {"student": "a", "optimizer.learning_rate": "0.1", "seed": "–"},
        {"student": "b", "optimizer.learning_rate": "–", "seed": "1"},
    ]
    assert sweep.runs[1].settings.order_seed == 0


def test_listed_runs_with_sections_of_their_own_have_labels_too(read: Read) -> None:
    """Beside others that name theirs; a section that has a name goes by it."""
    sweep = read(
        student={"model": "m/common"},
        students={"a": {"model": "m/a"}},
        losses={"text": {"kind": "cross_entropy"}},
        runs=[
            {"name": "one", "student": "a", "loss": "text"},
            {"name": "two", "student": {"model": "m/b", "dtype": "bfloat16"}, "loss": {"kind": "cross_entropy"}},
            {"name": "three"},
        ],
    )
    assert [dict(run.labels) for run in sweep.runs] == [
        {"student": "a", "loss": "text"},
        {"student": "model=m/b, dtype=bfloat16", "loss": "text"},
        {"student": "model=m/common", "loss": "–"},
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"student": {"model": "m"}}, "found nothing for runs to differ in"),
        ({"students": {"a": {"model": "m"}}, "student_s": 1}, "found student_s"),
        ({"students": {"a": {"model": "m"}}, "student": {"model": "m"}}, "expected this or students, found both"),
        ({"student": {"model": "m"}, "seeds": [1], "seed": 2}, "the order of the records has order_seed"),
        ({"students": {"a/b": {"model": "m"}}}, "a run is a folder, found 'a/b'"),
        ({"student": {"model": "m"}, "seeds": [1, 1]}, "found 'seed1' twice"),
        ({"students": {"a": {"modle": "m"}}}, "run 'a'"),
        ({"student": {"model": "m"}, "axes": {"loss": {"a": {}}}}, "these have axes of their own"),
        ({"student": {"model": "m"}, "axes": {"rate": {}}}, "found none of rate"),
        ({"runs": [{"name": "one", "student": "a"}], "seeds": [1]}, "expected this or seeds and axes"),
        ({"runs": [{"name": "one", "student": "c"}]}, r"expected a name of students \(none\), found 'c'"),
        ({"runs": [{"name": "one", "student": {"model": "m"}, "step": 1}]}, "run 'one'"),
        ({"train": "nowhere.yaml", "seeds": [1]}, "expected a file of settings, found none"),
    ],
)
def test_sweep_that_cannot_be_meant_is_refused(read: Read, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**values)


def test_runs_share_a_stream_where_they_read_the_same_in_the_same_order(read: Read) -> None:
    student = {"model": "m"}
    runs: list[dict[str, Any]] = [
        {"name": "one"},
        {"name": "loss", "loss": {"kind": "cross_entropy"}, "seed": 4, "steps": 20, "optimizer": {"learning_rate": 1}},
        {"name": "cut", "micro_batch_sequences": 2, "support_slots": 3},
        {"name": "order", "order_seed": 1},
        {"name": "same-order", "seed": 1, "order_seed": None},
        {"name": "batch", "global_batch_sequences": 4},
        {"name": "held-out", "held_out": {"fraction": 0.5}},
        {"name": "manifest", "manifest": 2},
    ]
    sweep = read(student=student, runs=runs)
    assert [[run.name for run in group] for group in group_runs(sweep.runs)] == [
        ["one", "loss", "cut"],
        ["order", "same-order"],
        ["batch"],
        ["held-out"],
        ["manifest"],
    ]
    assert [[run.name for run in group] for group in group_runs(sweep.runs, 2)][:2] == [["one", "loss"], ["cut"]]
    one, loss, cut = (describe_collation(run.settings) for run in sweep.runs[:3])
    assert one == loss != cut


def test_storage_options_reach_the_runs_and_no_record(read: Read) -> None:
    secret = {"secret": "do-not-print"}
    sweep = read(student={"model": "m"}, seeds=[0], storage_options=secret, axes={"x": {"y": {"log_every": 1}}})
    assert sweep.runs[0].settings.storage_options == secret
    assert "do-not-print" not in repr(sweep.content)
    assert "storage_options" not in repr(sweep.content)


def test_secrets_of_listed_runs_are_in_no_label(read: Read) -> None:
    runs = [
        {
            "name": secret,
            "further_teachers": [{"store": "t", "weight": 0.5, "storage_options": {"secret": f"not-{secret}"}}],
            "document_weights": {"file": f"https://host/weights.csv?sig=not-{secret}"},
        }
        for secret in ("this", "that")
    ]
    sweep = read(student={"model": "m"}, runs=runs)
    assert sweep.runs[0].settings.further_teachers[0].storage_options == {"secret": "not-this"}
    assert [dict(run.labels) for run in sweep.runs] == [{}, {}]
    assert "not-th" not in repr(sweep.content)


def build_result(name: str, lm_loss: float | None, **labels: str) -> RunResult:
    evaluation = None if lm_loss is None else {"lm_loss": lm_loss, "teacher_lm_loss": 2.0, "bucket_kl": lm_loss - 1.5}
    status = "failed" if lm_loss is None else "finished"
    return RunResult(
        name=name, labels=labels, output=name, stream=0, status=status, all_steps=10, evaluation=evaluation, seconds=1.5
    )


def test_gap_is_the_way_from_the_student_of_the_text_alone_to_the_teacher(read: Read) -> None:
    losses = {"kl": {"kind": "bucket_kl"}, "text": {"kind": "cross_entropy", "weight": 0.1}}
    sweep = read(student={"model": "m"}, losses=losses, seeds=[0, 1])
    settings = {run.name: run.settings for run in sweep.runs}
    found = {"kl-seed0": 2.75, "kl-seed1": 3.5, "text-seed0": 3.0, "text-seed1": None}
    results = compute_gaps([build_result(name, loss) for name, loss in found.items()], settings)
    assert {result.name: result.gap_closed for result in results} == {
        "kl-seed0": 25.0,
        "kl-seed1": None,
        "text-seed0": 0.0,
        "text-seed1": None,
    }


def test_gap_is_to_the_student_of_the_text_of_the_same_records(read: Read) -> None:
    axes = {"corpus": {"a": {"store": "a"}, "b": {"store": "b"}}}
    sweep = read(
        student={"model": "m"}, losses={"kl": {"kind": "bucket_kl"}, "text": {"kind": "cross_entropy"}}, axes=axes
    )
    settings = {run.name: run.settings for run in sweep.runs}
    found = {"kl-a": 2.75, "kl-b": 3.5, "text-a": 3.0, "text-b": 5.0}
    results = compute_gaps([build_result(name, loss) for name, loss in found.items()], settings)
    assert [result.gap_closed for result in results] == [25.0, 50.0, 0.0, 0.0]


def test_means_are_over_finished_runs_of_several_seeds(tmp_path: Path) -> None:
    results = [
        build_result("a0", 3.0, student="a", seed="0"),
        build_result("a1", 5.0, student="a", seed="1"),
        build_result("b0", 4.0, student="b", seed="0"),
        build_result("b1", None, student="b", seed="1"),
    ]
    [mean] = compute_means(results)
    assert (mean.labels, mean.runs, mean.mean["lm_loss"]) == ({"student": "a"}, 2, 4.0)
    assert mean.spread == pytest.approx({"lm_loss": 2**0.5, "bucket_kl": 2**0.5, "seconds": 0.0})
    write_csv(results, tmp_path / "sweep.csv")
    lines = (tmp_path / "sweep.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith(
        "name,student,seed,status,parameters,steps,skipped_steps,positions,lm_loss,bits_per_byte,bucket_kl"
    )
    assert lines[1] == "a0,a,0,finished,,0,0,0,3.0,,1.5,,,,,,1.5,,,a0,"
    assert lines[4] == "b1,b,1,failed,,0,0,0,,,,,,,,,1.5,,,b1,"
