"""What a position counts, by the teacher's entropy and by its document."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_up import build_records

from logitstore.errors import ConfigError
from logitstore.records import DocumentSpan, Record, RecordBatch
from trainer.loss.position_weights import (
    compute_document_weights,
    compute_entropy_threshold,
    compute_entropy_weights,
)
from trainer.loss.settings import LossSettings

ENTROPY = torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0, math.nan])


def test_entropy_weights_without_rules_are_none() -> None:
    assert compute_entropy_weights(LossSettings(), ENTROPY) is None


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"min_entropy": 1.0}, [0.0, 0.0, 1.0, 1.0, 1.0, math.nan]),
        ({"full_weight_entropy": 2.0}, [0.0, 0.25, 0.5, 1.0, 1.0, math.nan]),
        ({"min_entropy": 0.6, "full_weight_entropy": 2.0}, [0.0, 0.0, 0.5, 1.0, 1.0, math.nan]),
    ],
)
def test_entropy_weights_at_the_edges_of_their_rules(rules: dict[str, float], expected: list[float]) -> None:
    found = compute_entropy_weights(LossSettings.model_validate(rules), ENTROPY)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


def test_entropy_threshold_leaves_out_the_fraction_it_was_asked_for() -> None:
    entropy = np.random.default_rng(0).random(1000, dtype=np.float32)
    threshold = compute_entropy_threshold(np.append(entropy, math.nan), 0.15)
    assert int((entropy < threshold).sum()) == 150


def test_entropy_threshold_of_nothing_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="positions of known entropy"):
        compute_entropy_threshold(np.full(3, math.nan), 0.15)


def build_packed_record(spans: list[tuple[str, int]]) -> Record:
    [record] = build_records(1, length=8, ragged=False)
    documents = tuple(DocumentSpan(document_id=name, start=start, document_offset=0) for name, start in spans)
    return replace(record, documents=documents)


def test_document_weights_follow_the_document_of_the_next_token() -> None:
    records = [build_packed_record([("a", 0), ("b", 3)]), build_packed_record([("c", 0), ("a", 6)])]
    found = compute_document_weights(RecordBatch.from_records(records), {"a": 0.5, "b": 0.0})
    # Token 3 is b's first, so position 2, which predicts it, is b's.
    expected = [0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    np.testing.assert_array_equal(found, np.array(expected, dtype=np.float32))


def test_document_weights_of_records_without_documents_are_refused() -> None:
    batch = replace(RecordBatch.from_records([build_packed_record([("a", 0)])]), documents=None)
    with pytest.raises(ConfigError, match="records with their documents, found none"):
        compute_document_weights(batch, {"a": 0.5})
