from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from logitstore.errors import ConfigError, TeacherError
from logitstore.records import Signal
from logitstore.teacher.head import ChunkedLogits, LogitsPart
from logitstore.teacher.huggingface import HuggingFaceTeacher
from logitstore.teacher.loading import load_teacher
from logitstore.teacher.protocol import HeadTailMethod, Method, SampleMethod, TeacherSettings, TopKMethod

TOKENIZER_SIZE, PADDED_SIZE = 290, 304
FAMILIES = ["llama", "qwen3", "gemma2", "cohere", "granite", "gpt2", "qwen3_moe", "gpt_neox", "opt"]
# float32 forward passes of another shape: hidden states and logits (up to 40 here) differ by some units of rounding.
ATOL = 2e-4

SettingsFor = Callable[..., TeacherSettings]


def load(settings: TeacherSettings, method: Method | None = None) -> HuggingFaceTeacher:
    teacher = load_teacher(settings, method or TopKMethod(k=16))
    assert isinstance(teacher, HuggingFaceTeacher)
    return teacher


def draw_sequences(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    """Random ids of the given numbers of positions."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, TOKENIZER_SIZE, length + 1).astype(np.int32) for length in lengths]


def compute_dense(folder: str, token_ids: np.ndarray) -> np.ndarray:
    """[T, V] float64 logprobs of the model's own forward pass over the ids of the tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(token_ids[:-1].astype(np.int64))[None]).logits[0]
    values = logits[:, :TOKENIZER_SIZE].double().numpy()
    return values - np.logaddexp.reduce(values, axis=-1, keepdims=True)


def check_signal(signal: Signal, dense: np.ndarray, token_ids: np.ndarray, k: int) -> None:
    assert signal.num_positions == len(token_ids) - 1
    assert (signal.support_counts == k).all()
    ids = signal.support_ids.reshape(-1, k)
    kept = np.take_along_axis(dense, ids, axis=-1)
    np.testing.assert_allclose(signal.support_logprobs.reshape(-1, k), kept, atol=ATOL)
    outside = dense.copy()
    np.put_along_axis(outside, ids, -np.inf, axis=-1)
    assert (outside.max(-1) <= kept.min(-1) + ATOL).all()
    np.testing.assert_allclose(signal.tail_logprob, np.logaddexp.reduce(outside, axis=-1), atol=ATOL)
    np.testing.assert_allclose(signal.entropy, -(np.exp(dense) * dense).sum(-1), atol=ATOL)
    expected = dense[np.arange(len(dense)), token_ids[1:]]
    np.testing.assert_allclose(signal.next_token_logprob, expected, atol=ATOL)


def check_equal(found: list[Signal], expected: list[Signal], atol: float = ATOL) -> None:
    assert [signal.num_positions for signal in found] == [signal.num_positions for signal in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.support_counts, other.support_counts)
        for column in ("support_logprobs", "tail_logprob", "entropy", "next_token_logprob"):
            np.testing.assert_allclose(getattr(one, column), getattr(other, column), atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_of_any_family_equals_its_own_dense_logits(family: str, settings_for: SettingsFor) -> None:
    settings = settings_for(family, batch_tokens=60, head_chunk_positions=7)
    teacher = load(settings)
    assert teacher.is_head_chunked == (family != "opt")
    sequences = draw_sequences([20, 13, 20, 1, 35])
    for token_ids, signal in zip(sequences, teacher.score(sequences), strict=True):
        check_signal(signal, compute_dense(settings.model, token_ids), token_ids, k=16)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3_moe"])
@pytest.mark.parametrize("changes", [{"batch_tokens": 1}, {"batch_tokens": 10_000}, {"head_chunk_positions": 3}])
def test_teacher_batching_and_chunking_do_not_change_results(
    family: str, changes: dict[str, int], settings_for: SettingsFor
) -> None:
    sequences = draw_sequences([5, 30, 12, 12, 1, 29, 8])
    expected = list(load(settings_for(family, batch_tokens=64)).score(sequences))
    check_equal(list(load(settings_for(family, **changes)).score(sequences)), expected)


def test_teacher_with_logits_in_small_blocks_gives_the_same_results(
    settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = draw_sequences([5, 30, 12])
    expected = list(load(settings_for()).score(sequences))
    monkeypatch.setattr("logitstore.teacher.huggingface.NUM_LOGITS_AT_ONCE", 4 * TOKENIZER_SIZE)
    check_equal(list(load(settings_for()).score(sequences)), expected, atol=1e-6)


def test_teacher_with_full_support_sums_to_one_over_the_tokenizers_ids(settings_for: SettingsFor) -> None:
    teacher = load(settings_for(), TopKMethod(k=1000))
    (signal,) = teacher.score(draw_sequences([10]))
    assert (signal.support_counts == TOKENIZER_SIZE).all()
    assert signal.support_ids.max() < TOKENIZER_SIZE
    assert np.isneginf(signal.tail_logprob).all()
    np.testing.assert_allclose(np.exp(signal.support_logprobs).reshape(10, -1).sum(-1), 1.0, atol=1e-5)


def test_teacher_with_nucleus_cut_gives_ragged_supports_that_reach_the_mass(settings_for: SettingsFor) -> None:
    teacher = load(settings_for(head_chunk_positions=4), TopKMethod(k=64, top_p=0.9, min_k=2))
    for signal in teacher.score(draw_sequences([30, 11])):
        assert len(set(signal.support_counts.tolist())) > 1
        assert signal.support_counts.min() >= 2
        for position in range(signal.num_positions):
            mass = np.exp(signal.support_at(position)[1]).sum()
            assert mass + np.exp(signal.tail_logprob[position]) == pytest.approx(1.0, abs=1e-5)
            assert mass >= 0.9 - 1e-5 or signal.support_counts[position] == 64


@pytest.mark.parametrize("method", [SampleMethod(num_draws=12), HeadTailMethod(threshold=0.05)])
def test_teacher_that_draws_gives_a_sequence_the_same_draws_in_any_company(
    method: Method, settings_for: SettingsFor
) -> None:
    sequences, keys = draw_sequences([5, 30, 12, 12, 1, 29, 8]), [3, 2**64 - 1, 5, 6, 7, 8, 9]
    teacher = load(settings_for(batch_tokens=64), method)
    expected = list(teacher.score(sequences, keys))
    order = [4, 2, 6, 0, 1]
    few = load(settings_for(batch_tokens=30, head_chunk_positions=3), method)
    found = list(few.score([sequences[i] for i in order], [keys[i] for i in order]))
    pairs = [
        (signal, expected[i], t) for i, signal in zip(order, found, strict=True) for t in range(len(sequences[i]) - 1)
    ]
    # Batches of other shapes round otherwise, which may move a draw across the border of two ids once in 1e5.
    assert sum(one.support_at(t)[0].tobytes() != other.support_at(t)[0].tobytes() for one, other, t in pairs) <= 1
    assert all(signal.support_draws is not None and signal.support_draws.dtype == np.uint16 for signal in found)
    (other,) = teacher.score([sequences[1]], [4])
    assert other.support_ids.tobytes() != expected[1].support_ids.tobytes()


@pytest.mark.parametrize(("keys", "found"), [(None, "none"), ([1], "1 for 2 sequences")])
def test_teacher_that_draws_without_a_key_for_each_sequence_is_refused_before_any_forward(
    keys: list[int] | None, found: str, settings_for: SettingsFor
) -> None:
    teacher = load(settings_for(), SampleMethod())
    with pytest.raises(ConfigError, match=f"method 'sample': expected a key .* found {found};"):
        teacher.score(draw_sequences([5, 5]), keys)


def test_teacher_types_are_those_of_a_signal(settings_for: SettingsFor) -> None:
    (signal,) = load(settings_for()).score(draw_sequences([4]))
    assert signal.support_counts.dtype == signal.support_ids.dtype == np.int32
    assert signal.support_logprobs.dtype == signal.tail_logprob.dtype == np.float32
    assert signal.entropy.dtype == signal.next_token_logprob.dtype == np.float32


def test_teacher_in_bfloat16_stays_within_its_precision(settings_for: SettingsFor) -> None:
    settings = settings_for(dtype="bfloat16")
    teacher = load(settings)
    assert teacher.identity.dtype == "bfloat16"
    assert teacher.is_head_chunked
    (token_ids,) = draw_sequences([24])
    (signal,) = teacher.score([token_ids])
    dense = compute_dense(settings.model, token_ids)
    # 8 bits of mantissa on logits of about 20, twice.
    assert np.abs(signal.next_token_logprob - dense[np.arange(24), token_ids[1:]]).mean() < 0.3


def test_teacher_scores_lazily_in_order(settings_for: SettingsFor) -> None:
    sequences = draw_sequences([3, 9, 5] * 30)
    signals = load(settings_for(batch_tokens=16)).score(sequences)
    assert [next(signals).num_positions for _ in range(4)] == [3, 9, 5, 3]
    assert not torch.is_inference_mode_enabled()
    assert len(list(signals)) == 86


def test_teacher_score_of_nothing_is_nothing(settings_for: SettingsFor) -> None:
    assert list(load(settings_for()).score([])) == []


@pytest.mark.parametrize("positions", [0, 129])
def test_teacher_with_impossible_length_is_refused_before_any_forward(
    positions: int, settings_for: SettingsFor
) -> None:
    teacher = load(settings_for())
    with pytest.raises(ConfigError, match=rf"sequence 1: expected at least 1 position .* 128, found {positions};"):
        teacher.score(draw_sequences([5, positions]))


def test_teacher_takes_the_longest_sequence_it_can_see(settings_for: SettingsFor) -> None:
    for family in ("gpt2", "opt"):
        (signal,) = load(settings_for(family)).score(draw_sequences([128]))
        assert signal.num_positions == 128


@pytest.mark.parametrize("bad_id", [-1, TOKENIZER_SIZE, PADDED_SIZE])
def test_teacher_with_id_outside_the_vocabulary_names_it(bad_id: int, settings_for: SettingsFor) -> None:
    sequences = draw_sequences([5, 5])
    sequences[1][-1] = bad_id
    with pytest.raises(TeacherError, match=rf"sequence 1: expected ids in \[0, 290\), found {bad_id};"):
        load(settings_for()).score(sequences)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_teacher_with_nan_logits_names_sequence_and_position(
    family: str, settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = ChunkedLogits.compute

    def compute_with_nan_after_id_7(logits: ChunkedLogits, sequences: list[torch.Tensor]) -> Iterator[LogitsPart]:
        token_ids = torch.cat(sequences)
        for part in compute(logits, sequences):
            is_bad, token_ids = (token_ids == 7)[: part.num_positions, None], token_ids[part.num_positions :]
            yield LogitsPart(
                part.num_positions,
                lambda start, stop, part=part, is_bad=is_bad: part.compute(start, stop).masked_fill(
                    is_bad[start:stop], torch.nan
                ),
            )

    monkeypatch.setattr(ChunkedLogits, "compute", compute_with_nan_after_id_7)
    sequences = [np.full(length, 50, dtype=np.int32) for length in (9, 30, 20)]
    sequences[2][11] = 7
    with pytest.raises(TeacherError, match=r"sequence 2, position 11: expected finite logits, found NaN at id 0;"):
        list(load(settings_for(family, head_chunk_positions=6)).score(sequences))


def test_load_of_a_model_with_nan_weights_says_so_when_scoring(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model("llama", tmp_path))
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path)
    teacher = load(TeacherSettings(model=str(tmp_path), device="cpu"))
    with pytest.raises(TeacherError, match="sequence 0, position 0: expected finite logits, found NaN"):
        list(teacher.score(draw_sequences([4])))


def test_load_of_an_unknown_architecture_names_it(make_model: Callable[..., Path], tmp_path: Path) -> None:
    config = json.loads((make_model("llama", tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"model_type": "telepathy", "architectures": ["Telepathy"]})
    )
    with pytest.raises(TeacherError, match=f"teacher '{tmp_path}': cannot be loaded: .*telepathy"):
        load(TeacherSettings(model=str(tmp_path), device="cpu"))


def test_teacher_that_fell_back_to_full_logits_says_so(
    settings_for: SettingsFor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="logitstore"):
        load(settings_for("llama"))
        assert not caplog.messages
        load(settings_for("opt"))
    (message,) = caplog.messages
    assert message.startswith("OPTForCausalLM: the head cannot be run apart from the body")


def test_identity_of_two_loads_is_the_same(settings_for: SettingsFor) -> None:
    first, second = (load(settings_for()).identity for _ in range(2))
    assert first == second
    assert (first.vocab_size, first.padded_vocab_size, first.max_positions) == (TOKENIZER_SIZE, PADDED_SIZE, 128)
    assert (first.architecture, first.dtype, first.end_of_text_id) == ("LlamaForCausalLM", "float32", 0)


def test_identity_with_one_changed_weight_differs_in_the_weights_only(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model("llama", tmp_path)
    settings = TeacherSettings(model=str(folder), device="cpu")
    before = load(settings).identity
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 0.001
    model.save_pretrained(folder)
    differences = before.differences(load(settings).identity)
    assert [line.split(":")[0] for line in differences] == ["weights_fingerprint"]


def test_identity_in_another_precision_differs(settings_for: SettingsFor) -> None:
    differences = load(settings_for()).identity.differences(load(settings_for(dtype="bfloat16")).identity)
    assert differences == ["dtype: 'float32' / 'bfloat16'"]


def test_load_with_tokenizer_wider_than_the_model_prints_both_sizes(
    settings_for: SettingsFor, make_tokenizer: Callable[..., object], tmp_path: Path
) -> None:
    make_tokenizer(PADDED_SIZE + 1).save_pretrained(tmp_path)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"tokenizer: 305\n  outputs of the model: 304"):
        load(settings_for(tokenizer=str(tmp_path)))


def test_load_of_a_hub_name_finds_the_snapshot_in_the_cache(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--some--teacher" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(model_folder("llama"))
    (tmp_path / "models--some--teacher" / "refs").mkdir()
    (tmp_path / "models--some--teacher" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    by_name = load(TeacherSettings(model="some/teacher", device="cpu")).identity
    by_path = load(TeacherSettings(model=str(model_folder("llama")), device="cpu")).identity
    assert by_name.model != by_path.model
    assert by_name.differences(by_path) == []  # a name and the folder that it stands for are one teacher


def test_load_of_a_folder_without_a_model_says_what_to_give(
    make_tokenizer: Callable[..., object], tmp_path: Path
) -> None:
    make_tokenizer().save_pretrained(tmp_path)  # type: ignore[attr-defined]
    with pytest.raises(TeacherError, match=r"cannot be loaded: .*; give a folder made by save_pretrained"):
        load(TeacherSettings(model=str(tmp_path)))


def test_load_of_a_model_without_some_of_its_weights_is_refused(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    file = make_model("llama", tmp_path) / "model.safetensors"
    weights = load_file(file)
    assert "lm_head.weight" in weights
    save_file({name: values for name, values in weights.items() if name != "lm_head.weight"}, file, {"format": "pt"})
    with pytest.raises(TeacherError, match=r"expected all of its weights, found none for lm_head\.weight; "):
        load(TeacherSettings(model=str(tmp_path), device="cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_load_on_a_device_that_is_not_there_is_refused(settings_for: SettingsFor) -> None:
    with pytest.raises(ConfigError, match="expected a CUDA device, found none"):
        load(settings_for(device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_teacher_on_a_gpu_gives_the_results_of_the_cpu(settings_for: SettingsFor) -> None:
    sequences = draw_sequences([30, 12, 30, 5])
    expected = list(load(settings_for()).score(sequences))
    check_equal(list(load(settings_for(device="cuda")).score(sequences)), expected, atol=1e-2)


def test_teacher_encodes_and_decodes_without_adding_anything(settings_for: SettingsFor) -> None:
    teacher = load(settings_for())
    texts = ["  with open(path) as stream:\n", "ünïcode ☃"]
    assert [teacher.decode(token_ids) for token_ids in teacher.encode(texts)] == texts
    assert teacher.encode([]) == []
