"""Packed rows: students that keep the records apart learn what they learn from padded rows, others are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from made_up import VOCAB_SIZE
from taught_stores import CONFIG, build_model
from training_runs import read_weights

from logitstore.errors import ConfigError
from logitstore.records import Record, RecordBatch
from trainer.config import TrainSettings
from trainer.data import collate
from trainer.distributed import Processes
from trainer.loop import train
from trainer.loss.settings import LossSettings
from trainer.packing import check_packing
from trainer.run import prepare_run
from trainer.run_results import collect_student
from trainer.taught_student import TaughtStudent

MakeSettings = Callable[..., TrainSettings]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("is_fused", [True, False])
def test_packed_batch_has_loss_and_gradients_of_the_padded_one(
    taught_records: list[Record], model_type: str, attention: str, is_fused: bool
) -> None:
    """In float64; the students' norms and rotations run in float32 whatever their dtype."""
    student = build_model(seed=5, model_type=model_type, head_dim=8, attn_implementation=attention)
    check_packing(student, vocab_size=VOCAB_SIZE)
    student.double()
    taught = TaughtStudent(student, LossSettings(), vocab_size=VOCAB_SIZE, precision="float32", is_fused=is_fused)
    batch = RecordBatch.from_records(taught_records)
    results = []
    for is_packed in (False, True):
        loss = taught(collate(batch, is_packed=is_packed), 0.75)
        results.append((loss.total.detach(), torch.autograd.grad(loss.total, list(student.parameters()))))
    (total, gradients), (packed_total, packed_gradients) = results
    torch.testing.assert_close(packed_total, total, rtol=1e-6, atol=0)
    for one, other in zip(packed_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("bloom", {}),
        ("opt", {"word_embed_proj_dim": 16, "ffn_dim": 32}),
        ("mamba", {}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    ],
)
def test_student_that_reads_across_records_is_refused(model_type: str, changes: dict[str, object]) -> None:
    """Positions from a mask, biases by distance, recurrences, convolutions; of the small fresh weights of a student."""
    student = build_model(seed=5, model_type=model_type, initializer_range=0.02, **changes)
    with pytest.raises(ConfigError, match="expected a student that keeps the records of a row apart, found"):
        check_packing(student, vocab_size=VOCAB_SIZE)


def test_student_that_takes_no_position_ids_is_refused() -> None:
    student = build_model(seed=5)
    forward = student.forward
    student.forward = lambda input_ids, use_cache: forward(input_ids=input_ids)  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="a student that takes position_ids, found LlamaForCausalLM with sdpa"):
        check_packing(student, vocab_size=VOCAB_SIZE)


def test_student_is_left_as_it_was_by_the_check() -> None:
    student = build_model(seed=5, attention_dropout=0.5).to(torch.bfloat16)
    student.train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    check_packing(student, vocab_size=VOCAB_SIZE)
    assert student.training
    for name, value in student.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in student.parameters())


def read_trained(settings: TrainSettings) -> dict[str, torch.Tensor]:
    report = train(settings)
    assert report.student is not None
    return read_weights(report.student)


@pytest.mark.slow
def test_runs_of_packed_micro_batches_by_tokens_train_the_student_of_whole_padded_batches(
    make_settings: MakeSettings, tmp_path: object
) -> None:
    expected = read_trained(make_settings(output=f"{tmp_path}/whole"))
    changes = [{"micro_batch_tokens": 30}, {"micro_batch_tokens": 30, "pack_sequences": True}, {"pack_sequences": True}]
    for number, change in enumerate(changes):
        found = read_trained(make_settings(output=f"{tmp_path}/{number}", **change))
        for name, value in expected.items():
            # Adam divides by the root of the squared gradient: rounding of a small one moves a weight by a part of the
            # learning rate (1e-2).
            torch.testing.assert_close(found[name], value, rtol=0, atol=2e-4)


def test_run_of_a_student_that_cannot_be_packed_is_refused_at_its_start(make_settings: MakeSettings) -> None:
    config = {**CONFIG, "model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 64}
    config = {key: config[key] for key in config if key not in ("intermediate_size", "num_key_value_heads")}
    with pytest.raises(ConfigError, match="pack_sequences: expected a student that keeps"):
        train(make_settings(student={"config": config}, pack_sequences=True))


def test_student_of_several_processes_is_put_together_without_being_tried_out_again(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, which may not know the kernel that the student was tried out with."""
    run = prepare_run(make_settings(pack_sequences=True), Processes(rank=0, world_size=1, device=torch.device("cpu")))

    def refuse(*_: object, **__: object) -> None:
        raise ConfigError("pack_sequences: no such kernel")

    monkeypatch.setattr("trainer.run_results.is_sharded", lambda model: True)
    monkeypatch.setattr("trainer.run_results.gather_state", lambda student, processes: student.state_dict())
    monkeypatch.setattr("trainer.run.check_packing", refuse)
    expected = {name: value.add_(1.0) for name, value in run.student.state_dict().items()}
    student = collect_student(run)
    run.close()
    assert student is not None
    assert all(torch.equal(value, expected[name]) for name, value in student.state_dict().items())
