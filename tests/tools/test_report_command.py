"""`logitstore report`: what the page is made of, and that it stays small; in a browser: test_report_in_browser.py."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import VOCAB_SIZE, build_identity, build_plan, build_records, build_signal, put_shard
from made_up_draws import build_drawn_records

from logitstore.records import DocumentSpan, Record, RecordAddress, RecordBatch
from logitstore.store.commit import build_attempt, commit_unit
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import write_manifest
from logitstore.store.plan import create_plan
from tools.store_report.numbers import (
    FIRST_DRAWS,
    INFINITE,
    LOWEST_EXPONENT,
    UNKNOWN,
    encode_draws,
    encode_nats,
    encode_numbers,
    encode_shares,
)
from tools.store_report.payload import build_palette, build_payload, read_payload, split_planes
from tools.store_report.sample import Sample, read_sample, share_out
from tools.store_report.token_table import build_token_table, escape_invisible
from tools.store_report.voices import build_voice

FIVE_MEGABYTES = 5_000_000


def decode(codes: np.ndarray) -> np.ndarray:
    """The numbers of codes, as the page's script has them."""
    codes = codes.astype(np.int64)
    values = (100 + (codes - 1) % 900) * 10.0 ** ((codes - 1) // 900 + LOWEST_EXPONENT - 2)
    values = np.where(codes == 0, 0.0, values)
    return np.where(codes == UNKNOWN, np.nan, np.where(codes == INFINITE, np.inf, values))


@given(st.floats(1e-14, 1e15))
def test_number_is_kept_to_three_digits(value: float) -> None:
    [found] = decode(encode_numbers(np.array([value])))
    assert found == pytest.approx(value, rel=0.00501)
    [found] = decode(encode_shares(np.array([value])))
    assert found == pytest.approx(value, rel=0.0505 if value < 0.1 else 0.00501)


@given(st.lists(st.floats(0, 1e18), min_size=2, max_size=2))
def test_codes_are_in_the_order_of_their_numbers(values: list[float]) -> None:
    low, high = encode_numbers(np.array(sorted(values)))
    assert low <= high < FIRST_DRAWS


def test_what_is_no_number_has_codes_of_its_own() -> None:
    codes = encode_numbers(np.array([0.0, -1e-9, np.nan, np.inf, 1e-300, 1.0, 0.9999]))
    assert codes[:5].tolist() == [0, 0, UNKNOWN, INFINITE, 1]
    assert codes[5] == codes[6]
    assert encode_draws(np.array([1, 60_000])).tolist() == [FIRST_DRAWS + 1, FIRST_DRAWS + 32_000]
    assert decode(encode_nats(np.array([2.345678, 0.001, 12.345]))).tolist() == pytest.approx([2.35, 0.0, 12.3])


def read_page(path: Path) -> tuple[dict[str, Any], list[dict[str, np.ndarray]]]:
    payload = re.search(r'id="payload">([^<]*)</script>', path.read_text(encoding="utf-8"))
    assert payload is not None
    return read_payload(payload[1])


def test_columns_survive_planes_and_palettes() -> None:
    values = np.array([7, 300, 7, 65535, 300, 7], dtype=np.uint16)
    palette, places = build_palette(values)
    assert palette[0] == 7
    np.testing.assert_array_equal(palette[places], values)
    assert split_planes(np.array([1, 258], dtype=np.uint16)) == bytes([1, 2, 0, 1])


def test_candidates_of_a_voice_are_the_likeliest_and_the_one_that_came_next() -> None:
    batch = RecordBatch.from_records(build_records(30, vocab_size=VOCAB_SIZE))
    voice = build_voice("teacher", batch, top=3)
    starts = np.cumsum(voice.candidates.counts, dtype=int) - voice.candidates.counts
    position = 0
    for record in batch:
        for t in range(record.num_positions):
            ids, logprobs = record.signal.support_at(t)
            start = int(starts[position])
            shown = voice.candidates.token_ids[start : start + int(voice.candidates.counts[position])].tolist()
            assert shown[0] == ids[0]
            assert shown[voice.candidates.next_slots[position]] == record.token_ids[t + 1]
            likely = [int(one) for one, logprob in zip(ids[:3], logprobs[:3], strict=True) if math.exp(logprob) > 0.01]
            assert set(likely) <= set(shown) <= {*ids[:3].tolist(), int(record.token_ids[t + 1])}
            position += 1
    assert position == len(voice.entropy)


def test_page_holds_the_records_and_what_the_teacher_said(
    build_store: Callable[..., LogitStore], logitstore: Any, tmp_path: Path
) -> None:
    store = build_store()
    result = logitstore.json("report", store.url, "--output", tmp_path / "page.html")
    header, (shared, voice) = read_page(tmp_path / "page.html")
    records = [one for one in store if str(one.address) in {record["address"] for record in header["records"]}]
    assert result["records"] == len(records) == len(header["records"]) > 10
    assert result["positions"] == sum(record.num_positions for record in records)
    assert result["bytes"] == (tmp_path / "page.html").stat().st_size
    tokens = shared["vocabulary"][voice["tokens"]]
    starts = np.cumsum(voice["counts"], dtype=int) - voice["counts"]
    next_ids = np.concatenate([record.token_ids[1:] for record in records])
    np.testing.assert_array_equal(tokens[starts + voice["nextSlots"]], next_ids)
    np.testing.assert_array_equal(
        shared["vocabulary"][shared["firstTokens"]], [record.token_ids[0] for record in records]
    )
    entropy = np.concatenate([record.signal.entropy for record in records])
    np.testing.assert_allclose(decode(voice["entropy"]), entropy, atol=0.00501)
    np.testing.assert_array_equal(
        shared["isTaught"].astype(bool), np.concatenate([record.loss_mask for record in records])
    )
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"{len(store):,}</dd>" in text
    assert text.count("<svg") == 4
    assert not re.search(r"https?://|<link rel=.stylesheet|<img|@import|url\(", text)


def test_records_are_few_where_few_are_wanted_and_spread_over_the_store(
    build_store: Callable[..., LogitStore],
) -> None:
    store = build_store(num_units=6)
    sample = read_sample(store, ("teacher",), max_records=6, top=5)
    assert len(sample.records) == 6
    assert {record.address.unit for record in sample.records} == set(range(6))
    assert sample.positions_read >= sum(sizes.sum() for sizes in sample.support_sizes) > sample.num_positions


@pytest.mark.parametrize(
    ("sizes", "total", "shares"),
    [([133, 75, 59], 200, [71, 70, 59]), ([5, 5], 20, [5, 5]), ([9, 9, 9], 2, [0, 1, 1]), ([], 3, [])],
)
def test_records_are_shared_out_evenly_as_far_as_there_are_any(sizes: list[int], total: int, shares: list[int]) -> None:
    assert share_out(np.array(sizes, dtype=np.int64), total).tolist() == shares


def test_text_that_would_turn_lines_or_hide_is_written_as_escapes() -> None:
    assert escape_invisible("a\u202eb\x00\u200b\ufeff\u2028") == r"a\u202eb\x00\u200b\ufeff\u2028"
    assert escape_invisible("שלום\n\t👩‍👧 é") == "שלום\n\t👩‍👧 é"


def test_names_of_the_corpus_do_not_leave_their_place(logitstore: Any, tmp_path: Path) -> None:
    files = StoreFiles(str(tmp_path / "store"))
    hostile = "</script><img src=x>\u202e"
    plan = create_plan(files, build_plan(2, sources=(hostile, "b"), teacher=build_identity(model=hostile)))
    for unit in range(2):
        records = [
            replace(record, documents=(DocumentSpan(document_id=hostile, start=0, document_offset=0),))
            for record in build_records(3, unit=unit)
        ]
        commit_unit(files, put_shard(files, plan, unit, records, build_attempt(), tmp_path))
    write_manifest(files, plan.compute_fingerprint())
    logitstore("report", files.url, "--output", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<img" not in text
    assert "\u202e" not in text
    assert r"&lt;/script&gt;&lt;img src=x&gt;\u202e" in text
    assert text.count("<script") == text.count("</script>") == 2


def test_comparison_with_a_damaged_store_leaves_the_rest_of_the_page(
    build_store: Callable[..., LogitStore], logitstore: Any, tmp_path: Path, flip: Callable[[Path, int], None]
) -> None:
    store = build_store()
    other = tmp_path / "other"
    shutil.copytree(store.url, other)
    flip(sorted(other.glob("data/*.parquet"))[0], 300)
    page = tmp_path / "page.html"
    _, stderr = logitstore("report", store.url, "--against", other, "--output", page, exit_code=3)
    assert "not shown: the comparison of the stores: " in stderr
    assert 'id="text-view"' in page.read_text(encoding="utf-8")


def test_folder_in_place_of_a_page_is_refused(
    build_store: Callable[..., LogitStore], logitstore: Any, tmp_path: Path
) -> None:
    _, stderr = logitstore("report", build_store().url, "--output", tmp_path, exit_code=2)
    assert "expected a file, found a folder" in stderr


def test_damaged_store_shows_what_is_whole_and_ends_with_3(
    build_store: Callable[..., LogitStore], logitstore: Any, tmp_path: Path
) -> None:
    store = build_store()
    sorted(Path(store.url).glob("data/*.parquet"))[0].unlink()
    _, stderr = logitstore("report", store.url, "--output", tmp_path / "page.html", exit_code=3)
    assert "not shown: " in stderr
    header, _ = read_page(tmp_path / "page.html")
    assert {int(record["address"].split("/")[0]) for record in header["records"]} == {1, 2}
    assert "Could not be read" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_store_that_is_being_written_is_shown_as_it_is(
    growing_store: StoreFiles, logitstore: Any, tmp_path: Path
) -> None:
    result = logitstore.json("report", growing_store.url, "--output", tmp_path / "page.html")
    assert result["records"] > 0
    assert "3 of 4 committed" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_empty_store_has_a_page_without_text(logitstore: Any, tmp_path: Path) -> None:
    files = StoreFiles(str(tmp_path / "store"))
    plan = create_plan(files, build_plan(2))
    write_manifest(files, plan.compute_fingerprint())
    result = logitstore.json("report", files.url, "--output", tmp_path / "page.html")
    assert (result["records"], result["positions"]) == (0, 0)
    assert "payload" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def write_run(folder: Path, loss: float) -> None:
    folder.mkdir(parents=True)
    lines = [{"step": step, "held_out/lm_loss": loss + 1 / step} for step in (10, 20, 30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = {
        "positions": 99, "lm_loss": loss, "perplexity": math.exp(loss), "teacher_lm_loss": 1.0, "bucket_kl": loss / 9,
        "overlap": 0.5, "top1_agreement": 0.5, "calibration_error": 1.0, "bin_positions": [99], "bin_confidence": [0.5],
        "bin_accuracy": [0.5],
    }  # fmt: skip
    lines = [{"step": step, **evaluation, "lm_loss": loss + 1 / step} for step in (10, 30)]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4')


def test_runs_show_their_last_figures_and_their_curves(small_store_url: str, logitstore: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "sweep" / "small", 3.0)
    write_run(tmp_path / "sweep" / "large", 2.0)
    logitstore("report", small_store_url, "--output", tmp_path / "page.html", "--run", tmp_path / "sweep")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"<td class=best>{2 + 1 / 30:.4f}</td><td>{3 + 1 / 30:.4f}</td>" in text
    assert "as the runs say at their end" in text
    assert "Loss on the text, held out: nats per token over step" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "nowhere"], "expected the folder of a training run"),
        (["--student", "nowhere"], "nowhere"),
        (["--output", "nowhere/page.html"], "expected a folder to write it in"),
        (["--output", "pyproject.toml"], "expected a new file or an earlier page"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_shown_or_written_ends_with_2(
    arguments: list[str], message: str, small_store_url: str, logitstore: Any, tmp_path: Path
) -> None:
    output = [] if "--output" in arguments else ["--output", tmp_path / "page.html"]
    stdout, stderr = logitstore("report", small_store_url, *output, *arguments, exit_code=2)
    assert stdout == ""
    assert message in stderr
    assert not (tmp_path / "page.html").exists()


def test_store_of_another_corpus_is_refused(
    build_store: Callable[..., LogitStore], logitstore: Any, tmp_path: Path
) -> None:
    first, second = (build_store(str(tmp_path / name), seed=seed) for seed, name in enumerate("ab"))
    _, stderr = logitstore(
        "report", first.url, "--against", second.url, "--output", tmp_path / "page.html", exit_code=3
    )
    assert "not of the same sequences" in stderr


def speak_as_a_teacher(generator: np.random.Generator, positions: int, vocab_size: int, top_k: int) -> Record:
    """A record of k candidates from a large vocabulary, as sure and unsure as teachers are of text: 2 nats or so."""
    frequency = 1.0 / np.arange(1, vocab_size + 1)
    # The likeliest as often as words are in a language, without repeats at a position; what else is does not matter.
    likeliest = generator.choice(vocab_size, (3 * positions, 8), p=frequency / frequency.sum())
    is_mixed = (np.diff(np.sort(likeliest, axis=-1), axis=-1) > 0).all(-1)
    likeliest = likeliest[is_mixed][:positions]
    rest = np.broadcast_to(vocab_size + np.arange(top_k - 8), (positions, top_k - 8))
    support = np.concatenate([likeliest, rest], axis=-1)
    sharpness = generator.gamma(1.5, 1.2, (positions, 1))
    logits = -sharpness * np.log(np.arange(1, top_k + 1)) + generator.normal(0, 0.3, (positions, top_k))
    logprobs = -np.sort(-(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)), axis=-1) - 0.02
    slots = np.minimum(generator.geometric(0.5, positions) - 1, top_k - 1)
    next_ids = support[np.arange(positions), slots]
    return Record(
        address=RecordAddress(unit=0, index=0),
        token_ids=np.concatenate([[1], next_ids]).astype(np.int32),
        loss_mask=np.ones(positions, dtype=bool),
        signal=replace(
            build_signal(np.zeros((positions, 2)), np.zeros(positions, dtype=int), 1),
            support_counts=np.full(positions, top_k, dtype=np.int32),
            support_ids=support.ravel().astype(np.int32),
            support_logprobs=logprobs.ravel().astype(np.float32),
            tail_logprob=np.full(positions, math.log(0.02)) + generator.normal(0, 1, positions).astype(np.float32),
            entropy=-(np.exp(logprobs) * logprobs).sum(-1).astype(np.float32),
            next_token_logprob=logprobs[np.arange(positions), slots].astype(np.float32),
        ),
        documents=(DocumentSpan(document_id="corpus/part-00017.jsonl.zst@123456", start=0, document_offset=0),),
    )


@pytest.mark.slow
def test_page_of_200_records_of_1024_positions_stays_below_5_megabytes() -> None:
    generator = np.random.default_rng(0)
    records = [speak_as_a_teacher(generator, 1024, 150_000, 64) for _ in range(200)]
    entropy = np.concatenate([record.signal.entropy for record in records])
    assert 1.5 < entropy.mean() < 3
    batch = RecordBatch.from_records(records)
    sample = Sample(
        records=tuple(records),
        voices=(build_voice("teacher", batch, top=5),),
        positions_read=batch.num_positions,
        support_sizes=(np.ones(1, dtype=np.int64),),
        next_probabilities=(np.ones(1, dtype=np.int64),),
        damaged=(),
    )
    tokens = build_token_table(records, [sample.voices[0].candidates.token_ids], lambda before, ids: f" word{ids[0]}")
    assert len(tokens.token_ids) > 20_000
    payload = build_payload(sample, tokens)
    # Beside it stand the script, the style sheets, charts and tables: a page of one record has 50 kB.
    assert len(payload) < FIVE_MEGABYTES - 100_000
    header, (_, voice) = read_payload(payload)
    assert len(header["records"]) == 200
    assert len(voice["entropy"]) == 200 * 1024


def test_page_without_text_is_small(small_store_url: str, logitstore: Any, tmp_path: Path) -> None:
    result = logitstore.json("report", small_store_url, "--output", tmp_path / "page.html", "--records", 1)
    assert result["bytes"] < 100_000


def test_drawn_supports_say_how_often_a_token_was_drawn() -> None:
    batch = RecordBatch.from_records(build_drawn_records(5, "sample"))
    voice = build_voice("teacher", batch, top=50)
    assert voice.is_drawn
    is_next_alone = np.zeros(len(voice.candidates.values), dtype=bool)
    starts = np.cumsum(voice.candidates.counts, dtype=int) - voice.candidates.counts
    is_next_alone[starts + voice.candidates.next_slots] = True
    assert (voice.candidates.values[~is_next_alone] >= FIRST_DRAWS).all()


@pytest.mark.slow
def test_student_speaks_beside_the_teacher_about_the_same_positions(logitstore: Any, tmp_path: Path) -> None:
    import torch
    from taught_stores import build_model, build_taught_records

    teacher, student = build_model(0), build_model(1)
    student.save_pretrained(tmp_path / "run" / "student")
    files = StoreFiles(str(tmp_path / "store"))
    plan = create_plan(files, build_plan(1))
    records = build_taught_records(teacher, 5)
    commit_unit(files, put_shard(files, plan, 0, records, build_attempt(), tmp_path))
    write_manifest(files, plan.compute_fingerprint())
    logitstore("report", files.url, "--output", tmp_path / "page.html", "--student", tmp_path / "run")
    header, (shared, said, voice) = read_page(tmp_path / "page.html")
    assert [one["name"] for one in header["voices"]] == ["teacher", "run"]
    with torch.no_grad():
        logits = [student(torch.from_numpy(one.token_ids[None, :-1].astype(np.int64))).logits[0] for one in records]
    probs = torch.cat(logits).double().softmax(-1).numpy()
    next_ids = np.concatenate([record.token_ids[1:] for record in records])
    np.testing.assert_allclose(
        decode(voice["surprise"]), -np.log(probs[np.arange(len(probs)), next_ids]), atol=0.0051, rtol=0.006
    )
    starts = np.cumsum(voice["counts"], dtype=int) - voice["counts"]
    np.testing.assert_array_equal(shared["vocabulary"][voice["tokens"][starts]], probs.argmax(-1))
    np.testing.assert_allclose(decode(voice["values"][starts]), probs.max(-1), rtol=0.0505)
    is_taught = shared["isTaught"].astype(bool)
    kl = decode(voice["kl"])
    assert np.isnan(kl[~is_taught]).all()
    assert kl[is_taught].min() >= 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    found = re.search(r"KL to the teacher \(nats\)</th><td>([\d.]+)", text)
    assert found is not None
    assert float(found[1]) == pytest.approx(kl[is_taught].mean(), rel=0.03)
    assert len(said["entropy"]) == len(kl)
