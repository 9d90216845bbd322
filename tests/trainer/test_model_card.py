"""What a finished student's README.md says, and that its front matter is what the hub reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from huggingface_hub import ModelCard

from logitstore.store.logit_store import LogitStore
from trainer.config import TrainSettings
from trainer.loop import TrainReport, train
from trainer.model_card import build_model_card
from trainer.stores import RunStores

MakeSettings = Callable[..., TrainSettings]


@pytest.fixture(scope="module")
def finished(make_settings_in: MakeSettings, tmp_path_factory: pytest.TempPathFactory) -> TrainReport:
    return train(make_settings_in(tmp_path_factory.mktemp("card") / "small-student", steps=2))


def test_card_of_a_run_names_where_its_student_comes_from_and_what_was_measured(
    finished: TrainReport, taught_store: LogitStore
) -> None:
    assert finished.student is not None
    assert finished.evaluation is not None
    card = (finished.student / "README.md").read_text(encoding="utf-8")
    evaluation, teacher = finished.evaluation, taught_store.plan.teacher
    for row in (
        f"| store | `{taught_store.url}` |",
        f"| store's fingerprint | `{taught_store.fingerprint}` |",
        f"| manifest | {taught_store.manifest_number} |",
        f"| teacher | `{teacher.model}` ({teacher.architecture}, {teacher.dtype}) |",
        f"| teacher's weights | `{teacher.weights_fingerprint}` |",
        "| capture method | top_k k=",
        "| codec | kind=",
        "| began as | fresh weights |",
        "| loss | kind bucket_kl, weight 0.8, ",
        "| optimizer | adamw, learning_rate 0.01, ",
        "| steps | 2 of 8 sequences |",
        f"| tokens | {finished.positions:,} |",
        f"| perplexity | {evaluation.perplexity:.4f} |",
        f"| KL(teacher, student) | {evaluation.bucket_kl:.4f} | nats, outside",
        f"On {evaluation.positions:,} positions of records that were held out of the training (source held).",
    ):
        assert row in card, row


def test_front_matter_of_a_card_is_what_the_hub_reads(finished: TrainReport) -> None:
    assert finished.student is not None
    assert finished.evaluation is not None
    card = ModelCard.load(finished.student / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert "distillation" in card.data.tags
    assert card.data.model_name == "small-student"
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    scalars = finished.evaluation.list_scalars()
    assert measured["bucket_kl"] == scalars["bucket_kl"]
    assert set(measured) <= set(scalars)
    assert card.text.lstrip().startswith("# small-student")


def build(store: LogitStore, settings: TrainSettings) -> str:
    stores = RunStores(teachers=(store,))
    return build_model_card(settings, stores, steps=1, positions=10, evaluation=None)


def test_card_of_an_adapted_student_names_its_base_on_the_hub(
    taught_store: LogitStore, make_settings: MakeSettings
) -> None:
    card = build(taught_store, make_settings(student={"model": "some-org/Base-0.5B", "lora": {"rank": 4}}))
    assert ModelCard(card).data.base_model == "some-org/Base-0.5B"
    assert "| began as | `some-org/Base-0.5B` |" in card
    assert "| adapters | LoRA, rank 4, " in card
    assert "no records were held out" in card
    assert ModelCard(card).data.eval_results is None


def test_card_of_a_cut_student_says_what_was_cut(taught_store: LogitStore, make_settings: MakeSettings) -> None:
    card = build(taught_store, make_settings(student={"from_teacher": {"layers": [0, 2]}}))
    assert "| began as | a cut of the teacher: layers [0, 2] |" in card
    assert ModelCard(card).data.base_model is None


def test_card_of_a_student_of_the_text_alone_claims_no_distillation(
    taught_store: LogitStore, make_settings: MakeSettings
) -> None:
    card = build(taught_store, make_settings(loss={"kind": "cross_entropy"}))
    assert "without its teacher's signals" in card
    assert "distilled from" not in card


def test_card_of_a_student_with_another_tokenizer_names_how_it_was_taught(
    taught_store: LogitStore, make_settings: MakeSettings
) -> None:
    card = build(taught_store, make_settings(other_tokenizer={"method": "spans"}))
    assert "| in place of its kind | for a student with another tokenizer: method spans, temperature 100.0 |" in card
    changes = {"other_tokenizer": {"method": "spans"}, "loss": {"kind": "cross_entropy"}}
    assert "in place of its kind" not in build(taught_store, make_settings(**changes))


def test_card_names_what_was_read_and_what_counted_how_much(
    taught_store: LogitStore, make_settings: MakeSettings
) -> None:
    settings = make_settings(
        where={"sources": ["train"], "perplexity": {"max": 60}},
        support_slots=3,
        document_weights={"sources": {"train": 0.5}},
        skip_steps=[[2, 4], [1200, 1201]],
        order_seed=7,
    )
    stores = RunStores(teachers=(taught_store,))
    card = build_model_card(settings, stores, steps=8, positions=10, evaluation=None, skipped_steps=2)
    for row in (
        '| records | those that meet `{"sources": ["train"], "perplexity": {"max": 60.0}}` |',
        "| support | the 3 likeliest slots of every position, the others in the tail |",
        "| weights of documents | sources {'train': 0.5} |",
        "| steps | 8 of 8 sequences, 2 of them skipped: loss or gradient were not finite |",
        "| global batches left out | 2 to 3, 1,200 to 1,200, counted from 0 |",
        "| seed | 0, of the order of records 7 |",
    ):
        assert row in card, row
    plain = build(taught_store, make_settings())
    for label in ("records", "support", "weights of documents", "global batches left out"):
        assert f"| {label} |" not in plain
    assert "skipped" not in plain


def test_card_of_several_corpora_names_the_conditions_of_each(
    taught_store: LogitStore, make_settings: MakeSettings
) -> None:
    further = {"store": "elsewhere", "weight": 0.25, "where": {"sources": ["held"]}}
    stores = RunStores(teachers=(taught_store,), corpora=(taught_store,))
    settings = make_settings(further_corpora=[further])
    card = build_model_card(settings, stores, steps=1, positions=10, evaluation=None)
    assert card.count('| records | those that meet `{"sources": ["held"]}` |') == 1


def test_card_hides_secrets_of_addresses(
    taught_store: LogitStore, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LogitStore, "url", property(lambda _: "https://bucket.host/store?X-Signature=abc"))
    card = build(taught_store, make_settings())
    assert "abc" not in card
    assert "| store | `https://bucket.host/store?***` |" in card
