"""Runs over the records of several stores, and over parts of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from taught_stores import build_model, fill_store
from training_runs import read_lines, read_weights, train_until
from transformers import PreTrainedModel

from logitstore.errors import ConfigError, IncompatibleStoreError, TrainingError
from logitstore.records import Record, RecordAddress
from logitstore.store.aligned_records import AlignedBatch
from logitstore.store.logit_store import LogitStore
from logitstore.teacher.protocol import SampleMethod
from trainer.config import TrainSettings
from trainer.distributed import Processes
from trainer.loop import TrainReport, train
from trainer.run import prepare_run
from trainer.sources import name_records, select_sources
from trainer.stores import RunStores, open_pinned_stores

MakeSettings = Callable[..., TrainSettings]
ALONE = Processes(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def other_store(tmp_path_factory: pytest.TempPathFactory) -> LogitStore:
    """Another teacher's store of other text: units 4 to 7, where the first store has 0 to 3."""
    return fill_store(tmp_path_factory.mktemp("other"), build_model(seed=2), range(4, 8), num_units=8)


@pytest.fixture
def make_mixed(make_settings: MakeSettings, other_store: LogitStore) -> MakeSettings:
    """Function that builds the settings of a run of both corpora, a quarter of the records from the other one."""

    def make(weight: float = 0.25, **changes: Any) -> TrainSettings:
        corpus = {"store": other_store.url, "weight": weight}
        return make_settings(**{"further_corpora": [corpus], "log_records": True, **changes})

    return make


def read_units(settings: TrainSettings) -> list[list[int]]:
    lines = read_lines(Path(settings.output) / "records-rank0.jsonl")
    return [[int(address.split("/")[0]) for address in line["records"]] for line in lines]


def read_records_of_run(settings: TrainSettings) -> list[list[str]]:
    return [line["records"] for line in read_lines(Path(settings.output) / "records-rank0.jsonl")]


def check_students_are_equal(one: TrainReport, other: TrainReport) -> None:
    assert one.student is not None
    assert other.student is not None
    weights, expected = read_weights(one.student), read_weights(other.student)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_run_of_two_corpora_takes_its_records_by_their_weights(
    make_settings: MakeSettings, make_mixed: MakeSettings, tmp_path: Path
) -> None:
    """And is evaluated on the first one's held-out records, which are not trained on."""
    settings = make_mixed(steps=24)
    report = train(settings)
    units = read_units(settings)
    assert all(sum(unit >= 4 for unit in step) == 2 for step in units)  # of 8
    assert {unit for step in units for unit in step} == {0, 1, 2, 4, 5, 6, 7}
    numbers = [line["corpora"] for line in read_lines(Path(settings.output) / "records-rank0.jsonl")]
    assert numbers == [[int(unit >= 4) for unit in step] for step in units]
    alone = train(make_settings(output=str(tmp_path / "alone"), steps=1))
    assert report.evaluation is not None
    assert alone.evaluation is not None
    assert report.evaluation.positions == alone.evaluation.positions


@pytest.mark.slow
def test_run_of_two_corpora_stopped_and_resumed_equals_the_one_that_never_stopped(
    make_mixed: MakeSettings, tmp_path: Path
) -> None:
    whole = make_mixed(output=str(tmp_path / "whole"), steps=12)
    report = train(whole)
    halves = make_mixed(output=str(tmp_path / "halves"), steps=12)
    train_until(halves, 5)
    check_students_are_equal(train(halves), report)
    assert read_records_of_run(halves) == read_records_of_run(whole)


def count_by_corpus(addresses: Iterable[str]) -> list[Counter[str]]:
    first, other = Counter[str](), Counter[str]()
    for address in addresses:
        (other if int(address.split("/")[0]) >= 4 else first)[address] += 1
    return [first, other]


@pytest.mark.slow
def test_run_goes_on_with_other_weights_and_loses_no_record(make_mixed: MakeSettings) -> None:
    """48 and 64 records: 30 and 10 of them come by a quarter, the rest of the first epochs by a half."""
    train_until(make_mixed(steps=17), 5)
    train(make_mixed(0.5, steps=17))
    settings = make_mixed(0.5, steps=17)
    steps = read_records_of_run(settings)
    assert [sum(int(a.split("/")[0]) >= 4 for a in step) for step in steps] == [2] * 5 + [4] * 12
    first, other = count_by_corpus(address for step in steps for address in step)
    assert (first.total(), other.total()) == (30 + 48, 10 + 48)
    assert (len(first), set(other.values())) == (48, {1})
    early, _ = count_by_corpus(address for step in steps[:9] for address in step)
    assert set(early.values()) == {1}  # 30 + 16 of 48


@pytest.mark.slow
def test_run_goes_on_without_a_corpus_and_with_it_again(make_settings: MakeSettings, make_mixed: MakeSettings) -> None:
    train_until(make_mixed(steps=9), 3)
    train_until(make_settings(steps=9, log_records=True), 6)
    settings = make_mixed(steps=9)
    train(settings)
    steps = read_records_of_run(settings)
    assert [sum(int(a.split("/")[0]) >= 4 for a in step) for step in steps] == [2, 2, 2, 0, 0, 0, 2, 2, 2]
    first, other = count_by_corpus(address for step in steps for address in step)
    assert set(other.values()) == {1}
    assert (len(first), first.total()) == (48, 60)


@pytest.mark.slow
def test_run_of_one_corpus_becomes_one_of_two_at_the_end_of_an_epoch(
    make_settings: MakeSettings, make_mixed: MakeSettings
) -> None:
    """Of 48 records, after step 6."""
    train_until(make_settings(log_records=True), 3)
    with pytest.raises(IncompatibleStoreError, match="expected the end of an epoch, found step 3, 3 of 6 steps into"):
        train(make_mixed())
    train_until(make_settings(log_records=True), 6)
    settings = make_mixed()
    train(settings)
    assert [sum(unit >= 4 for unit in step) for step in read_units(settings)] == [0] * 6 + [2] * 2


def test_run_takes_the_records_that_meet_its_conditions_and_stays_with_them(
    make_settings: MakeSettings, taught_store: LogitStore, other_store: LogitStore
) -> None:
    """One condition on the first store, for both of its parts, and another on the other."""
    middle = float(np.median(list_perplexities(taught_store)))
    where = {"perplexity": {"max": middle}}
    corpora = [{"store": other_store.url, "weight": 0.5, "where": {"perplexity": {"min": middle}}}]
    settings = make_settings(where=where, further_corpora=corpora, checkpoint_every=4, log_records=True)
    [own, other], held_out = select_sources(settings, RunStores(teachers=(taught_store,), corpora=(other_store,)))
    assert 0 < len(own.records) + len(held_out) == sum(p < middle for p in list_perplexities(taught_store))
    assert len(other.records) == sum(p >= middle for p in list_perplexities(other_store))
    train(settings)
    for address in (address for step in read_records_of_run(settings) for address in step):
        unit, index = map(int, address.split("/"))
        store = taught_store if unit < 4 else other_store
        [perplexity] = list_perplexities([store.find(RecordAddress(unit=unit, index=index))])
        assert (perplexity < middle) is (unit < 4)
    with pytest.raises(TrainingError, match=r"where\.perplexity"):
        train(make_settings(where={"perplexity": {"max": 2 * middle}}, further_corpora=corpora, checkpoint_every=4))


def list_perplexities(records: Iterable[Record]) -> list[float]:
    taught = [record.signal.next_token_logprob[record.loss_mask] for record in records]
    return [float(np.exp(-values.mean(dtype=np.float64))) for values in taught if len(values)]


def test_teachers_speak_about_the_records_that_meet_the_conditions(
    make_settings: MakeSettings, taught_store: LogitStore, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    other = fill_store(tmp_path, teacher, range(1, 4), top_k=3)
    middle = float(np.median(list_perplexities(taught_store)))
    settings = make_settings(
        where={"perplexity": {"max": middle}}, further_teachers=[{"store": other.url, "weight": 0.5}], steps=2
    )
    run = prepare_run(settings, ALONE)
    for _ in range(2):
        batch = next(run.stream)
        assert isinstance(batch, AlignedBatch)
        assert set(batch.units.tolist()) <= {1, 2}
        assert max(list_perplexities(batch)) < middle
        np.testing.assert_array_equal(batch.token_ids, batch.further[0].token_ids)
    run.close()


def test_copy_of_the_first_store_at_another_manifest_is_refused(
    make_settings: MakeSettings, grow_store: Callable[[range], LogitStore]
) -> None:
    early = grow_store(range(2))
    stores = RunStores(teachers=(grow_store(range(2, 4)),), corpora=(early,))
    settings = make_settings(held_out=None, further_corpora=[{"store": early.url, "weight": 0.5}])
    with pytest.raises(ConfigError, match="expected the manifest of the first store, which it is a copy of"):
        select_sources(settings, stores)


def test_store_that_is_asked_for_twice_is_opened_at_one_manifest(
    make_settings: MakeSettings, grow_store: Callable[[range], LogitStore]
) -> None:
    early = grow_store(range(2))
    grow_store(range(2, 4))
    corpora = [{"store": early.url, "weight": 0.2, "where": where} for where in (None, {"sources": ["train"]})]
    settings = make_settings(store=early.url, manifest=1, held_out=None, further_corpora=corpora)
    assert [store.manifest_number for store in open_pinned_stores(settings, None, ALONE).every] == [1, 1, 1]


def test_records_are_named_with_their_corpus(make_mixed: MakeSettings) -> None:
    run = prepare_run(make_mixed(0.5), ALONE)
    batch = next(run.stream)
    names = [f"{address} of corpus {int(address.unit >= 4)}" for address in batch.addresses()]
    assert name_records(batch) == names
    parts = run.settings.model_copy(update={"micro_batch_tokens": 20}).micro_batches.split(batch)
    assert sorted(name for part in parts for name in name_records(part)) == sorted(names)
    run.close()


def test_weights_of_sources_are_those_of_each_record_in_its_own_corpus(
    make_settings: MakeSettings, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    """Unit 2 is of the source `train` in the first store, and of `held` in the other."""
    other = fill_store(tmp_path, teacher, range(3), num_units=3, sources=("train", "train", "held"))
    corpora = [{"store": other.url, "weight": 0.5}]
    run = prepare_run(make_settings(further_corpora=corpora, document_weights={"sources": {"held": 0.25}}), ALONE)
    found = set()
    for _ in range(6):
        batch = next(run.stream)
        assert run.document_weights is not None
        assert batch.stream_sources is not None
        weights = run.document_weights.compute(batch)[batch.position_offsets[:-1]]
        found |= set(zip(batch.stream_sources.tolist(), batch.units.tolist(), weights.tolist(), strict=True))
    run.close()
    assert found == {(n, unit, 0.25 if (n, unit) == (1, 2) else 1.0) for n in range(2) for unit in range(3)}


def test_corpus_of_another_tokenizer_is_refused(
    make_settings: MakeSettings, tmp_path: Path, other_store: LogitStore
) -> None:
    other = fill_store(tmp_path, build_model(seed=2), range(1), tokenizer_fingerprint="2" * 64)
    with pytest.raises(IncompatibleStoreError, match="tokenizer_fingerprint"):
        prepare_run(make_settings(further_corpora=[{"store": other.url, "weight": 0.5}]), ALONE)


def test_corpus_of_drawn_supports_beside_one_of_the_likeliest_is_refused(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    drawn = fill_store(tmp_path, build_model(seed=2), range(0), method=SampleMethod(num_draws=4))
    with pytest.raises(ConfigError, match="further_corpora: expected stores that one loss suits"):
        prepare_run(make_settings(further_corpora=[{"store": drawn.url, "weight": 0.5}]), ALONE)


def test_run_skips_global_batches_and_makes_as_many_steps(make_settings: MakeSettings, tmp_path: Path) -> None:
    whole, skipping = (
        make_settings(output=str(tmp_path / name), log_records=True, steps=steps, skip_steps=skip)
        for name, steps, skip in (("whole", 8, []), ("skipping", 5, [[1, 3], [5, 6]]))
    )
    train(whole)
    train_until(skipping, 2)
    train(skipping)
    steps = read_records_of_run(whole)
    assert read_records_of_run(skipping) == [steps[step] for step in (0, 3, 4, 6, 7)]


def test_run_with_a_cache_trains_the_same_student_and_fills_it(make_settings: MakeSettings, tmp_path: Path) -> None:
    plain = train(make_settings(output=str(tmp_path / "plain")))
    folder = tmp_path / "cache"
    cached = train(make_settings(cache={"folder": str(folder), "max_bytes": 10**8}))
    check_students_are_equal(cached, plain)
    assert sum(path.is_file() for path in folder.rglob("*")) > 0


def test_run_with_a_scratch_trains_the_same_student(make_settings: MakeSettings, tmp_path: Path) -> None:
    pytest.importorskip("xxhash")
    plain = train(make_settings(output=str(tmp_path / "plain")))
    kept = train(make_settings(scratch={"folder": str(tmp_path / "scratch"), "max_bytes": "10MB"}))
    check_students_are_equal(kept, plain)
    assert list((tmp_path / "scratch").iterdir()) == []
