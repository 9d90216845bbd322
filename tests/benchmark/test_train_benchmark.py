"""The train benchmark on a tiny student: what it compares are the same steps, and rows say what was measured."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from logitstore.records import RecordBatch
from logitstore.shard.codec import Float32Codec
from logitstore.shard.invariants import find_violations
from logitstore.shard.layout import FORMAT_VERSION, ShardHeader
from logitstore.store.logit_store import LogitStore
from logitstore.stream.iterator import RecordStream
from tools.benchmark import app
from tools.benchmark.synthetic_teacher import build_synthetic_records
from tools.benchmark.train import (
    STEP_HEADER,
    Part,
    build_step_row,
    build_sweep_rows,
    measure_in_turns,
    name_row,
    print_found,
)
from tools.benchmark.train_steps import (
    Case,
    Measured,
    compute_chunked_loss,
    compute_dense_loss,
    count_parameters,
    cut_positions,
    opened_distillation,
    opened_plain,
    opened_run,
    opened_side_by_side,
    read_tokens,
    take_plain_step,
    write_train_store,
)
from trainer.loop import take_step

VOCAB_SIZE, TOP_K, LENGTH = 500, 8, 24


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("train")
    store = write_train_store(folder, num_records=8, length=LENGTH, top_k=TOP_K, vocab_size=VOCAB_SIZE)
    return Case(
        store=store,
        vocab_size=VOCAB_SIZE,
        length=LENGTH,
        sequences=4,
        micro_batch_sequences=2,
        hidden_size=16,
        layers=2,
        steps=2,
        device="cpu",
    )


def test_cut_record_is_a_true_one() -> None:
    [record] = build_synthetic_records(1, TOP_K, vocab_size=VOCAB_SIZE)
    header = ShardHeader(
        format_version=FORMAT_VERSION, unit=0, plan_fingerprint="0" * 64, vocab_size=VOCAB_SIZE, codec=Float32Codec()
    )
    cut = cut_positions(record, LENGTH)
    assert cut.num_positions == LENGTH
    assert list(find_violations(RecordBatch.from_records([cut]), header)) == []


def test_first_batch_takes_from_no_more_of_the_store_than_it_is(case: Case) -> None:
    """What else there is has to be read while the clock runs."""
    store = LogitStore.open(case.store)
    assert len(store) == case.steps * case.sequences
    order = RecordStream(store, global_batch_sequences=case.sequences).order
    first, second = (set(order.compute_batch(step).row_groups.tolist()) for step in range(2))
    assert len(first) == len(second) == case.sequences
    assert not first & second


@pytest.mark.slow
def test_plain_losses_are_the_cross_entropy_of_the_run(case: Case) -> None:
    with opened_run(case, "bucket_kl") as run:
        token_ids = read_tokens(run.store, case.sequences)
        records = RecordBatch.from_records([run.store[index] for index in range(case.sequences)])
        dense, chunked = compute_dense_loss(run.student, token_ids), compute_chunked_loss(run.student, token_ids)
        gradients = [torch.autograd.grad(loss, list(run.student.parameters())) for loss in (dense, chunked)]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        text = take_step(run, run.prepare(records)).cross_entropy
        assert dense.item() == pytest.approx(text, rel=1e-5)
        assert chunked.item() == pytest.approx(text, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("is_chunked", [False, True])
def test_plain_steps_learn_their_tokens(case: Case, is_chunked: bool) -> None:
    with opened_run(case, "cross_entropy") as run:
        token_ids = read_tokens(run.store, case.sequences)
        losses = [take_plain_step(run, token_ids, case, is_chunked=is_chunked) for _ in range(10)]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_every_way_is_timed_without_what_comes_before_the_first_batch(case: Case) -> None:
    with opened_plain(case, is_chunked=False) as take:
        plain = take()
    assert (plain.wait_seconds, plain.first_seconds) == (0.0, 0.0)
    for opened in (opened_distillation(case), opened_side_by_side([case, case])):
        with opened as take:
            first, second = take(), take()
        assert 0 <= first.wait_seconds <= first.seconds
        assert 0 <= second.wait_seconds <= second.seconds
        assert (first.first_seconds > 0, second.first_seconds) == (True, 0.0)


def test_parameters_are_counted_with_tied_embeddings_once(case: Case) -> None:
    of_layer = 4 * 16 * 16 + 3 * 16 * 43 + 2 * 16
    assert count_parameters(case) == VOCAB_SIZE * 16 + 2 * of_layer + 16


def test_row_of_steps_is_compared_with_the_plain_ones_turn_by_turn() -> None:
    found = [Measured(seconds=seconds, wait_seconds=0.01, first_seconds=0.2) for seconds in (1.9, 2.0, 4.0)]
    plain = [Measured(seconds=seconds) for seconds in (1.9, 1.8, 3.8)]  # the machine was busy in the last turn
    row = build_step_row(name_row("bucket_kl"), found, positions=4096, plain=plain)
    assert row == ["logitstore train, bucket_kl", "2,048", "26.2%", "0.950", "2.6%", "0.38%", "0.20"]
    assert len(row) == 1 + len(STEP_HEADER)
    assert build_step_row("plain, chunked", plain, 4096, plain)[3:] == ["1.000", "0.0%", "–", "–"]


def test_each_turn_has_every_alternative_and_begins_with_another() -> None:
    taken = []

    def take(name: str) -> Measured:
        taken.append(name)
        return Measured(seconds=len(taken))

    found = measure_in_turns({name: partial(nullcontext, partial(take, name)) for name in "abc"}, 2, 2)
    assert taken == list("abcbcacababc")
    assert [run.seconds for run in found["a"]] == [1, 6, 8, 10]


def test_steps_are_compared_with_the_faster_plain_ones(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    ours, dense, chunked = name_row("bucket_kl"), "plain, all logits", "plain, chunked"
    found = {
        name: [Measured(seconds=seconds, first_seconds=0.1)]
        for name, seconds in ((ours, 2.0), (dense, 3.0), (chunked, 1.0))
    }
    print_found(case, [Part.step], found)
    ratios = {row.split(" | ")[0]: row.split(" | ")[3] for row in capsys.readouterr().out.splitlines() if " | " in row}
    assert [ratios[f"| {name}"] for name in (ours, dense, chunked)] == ["0.500", "0.333", "1.000"]


def test_sweep_is_compared_with_both_students_alone() -> None:
    found = {
        "large": [Measured(seconds=2.0), Measured(seconds=2.2)],
        "the smaller one alone": [Measured(seconds=1.0), Measured(seconds=1.0)],
        "both in one sweep": [Measured(seconds=3.0), Measured(seconds=3.2)],
    }
    assert build_sweep_rows(found, "large") == [
        ["one after the other", "3.100", "1.6%", "–", "–"],
        ["both in one sweep", "3.100", "1.6%", "1.000", "0.0%"],
    ]


@pytest.mark.slow
def test_command_prints_both_tables() -> None:
    options = "--vocab-size 500 --top-k 8 --length 16 --sequences 2 --micro-batch 1 --hidden-size 16 --layers 2"
    result = CliRunner().invoke(app, ["train", *options.split(), "--device", "cpu", "--steps", "1", "--repeats", "1"])
    assert result.exit_code == 0, result.output
    for row in ("plain, all logits", "plain, chunked", "logitstore train, bucket_kl", "both in one sweep"):
        assert f"| {row} |" in result.stdout
    assert f"`logitstore benchmark train {options} --loss bucket_kl --precision float32" in result.stdout
