"""Signals of a teacher that does not exist, at the vocabulary of today's models, for measuring codecs.

A logit is a bias and a product. An id's bias is −1.8 times the log of its rank among the ids plus ten, its direction is
random in 64 dimensions. Frequent ids are small ones, as in vocabularies that were built by merging, but only about: an
id's place in the ranking is its own value times a lognormal factor of width 1. Hidden states wander (correlation 0.5
from position to position), with lognormal lengths of width 0.5, so that some positions are sure and others are not. The
next token is drawn from the distribution.

The constants were chosen so that at V = 151,936 the drawn tokens have the order-0 entropy that real text has in a real
vocabulary (10.9 bits; 10.8 were counted over 12 million tokens of Python source and manuals in a public vocabulary of
151,643), and so that the ids of the supports close as large a part of the gap between that entropy and log2 V as those
of the quickstart's teacher do (at k = 32, 64 and 128: 38, 47 and 56% here, 37, 48 and 60% there). Entropies are
1.8 nats in the mean.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from logitstore.records import DocumentSpan, Record, RecordAddress, Signal

VOCAB_SIZE = 151_936
_DIMENSIONS = 64
_BIAS, _SCALE = 1.8, 6.0
_POSITIONS_AT_A_TIME = 256
_LENGTH = 1024


def build_synthetic_records(
    num_records: int, top_k: int, *, vocab_size: int = VOCAB_SIZE, seed: int = 0
) -> Iterator[Record]:
    """Records of 1,024 positions with exact top-k signals, float32."""
    generator = np.random.default_rng(seed)
    places = np.log(np.arange(vocab_size) + 20.0) + generator.normal(0, 1, vocab_size)
    ranks = np.argsort(np.argsort(places))
    bias = (-_BIAS * np.log(ranks + 10.0)).astype(np.float32)
    head = (generator.normal(0, 1, (_DIMENSIONS, vocab_size)) / np.sqrt(_DIMENSIONS)).astype(np.float32)
    hidden = np.zeros(_DIMENSIONS)
    for index in range(num_records):
        states = np.empty((_LENGTH, _DIMENSIONS), dtype=np.float32)
        for position in range(_LENGTH):
            hidden = 0.5 * hidden + np.sqrt(0.75) * generator.normal(0, 1, _DIMENSIONS)
            length = _SCALE * np.exp(generator.normal(0, 0.5)) * np.sqrt(_DIMENSIONS)
            states[position] = hidden * (length / np.linalg.norm(hidden))
        draws = generator.random(_LENGTH)
        parts = [
            _score(states[start : start + _POSITIONS_AT_A_TIME] @ head + bias, draws[start:], top_k)
            for start in range(0, _LENGTH, _POSITIONS_AT_A_TIME)
        ]
        yield _build_record(index, parts, top_k)


def _score(logits_PV: np.ndarray, draws: np.ndarray, top_k: int) -> tuple[np.ndarray, ...]:
    """Next ids, support ids, support logprobs, tail, entropy and next-token logprobs of some positions."""
    logits_PV -= logits_PV.max(axis=1, keepdims=True)
    probs_PV = np.exp(logits_PV)
    total = probs_PV.sum(axis=1, dtype=np.float64)
    logprobs_PV = logits_PV - np.log(total)[:, None].astype(np.float32)
    probs_PV /= total[:, None].astype(np.float32)
    top = np.argpartition(logprobs_PV, -top_k, axis=1)[:, -top_k:]
    order = np.argsort(-np.take_along_axis(logprobs_PV, top, axis=1), axis=1, kind="stable")
    ids = np.take_along_axis(top, order, axis=1)
    cumulative = np.cumsum(probs_PV, axis=1, dtype=np.float64)
    rows = np.arange(len(logits_PV))
    next_ids = (cumulative < (draws[: len(rows)] * cumulative[:, -1])[:, None]).sum(axis=1)
    entropy = -(probs_PV * logprobs_PV).sum(axis=1, dtype=np.float64)
    support_logprobs = np.take_along_axis(logprobs_PV, ids, axis=1)
    np.put_along_axis(probs_PV, ids, 0.0, axis=1)
    tail = np.log(probs_PV.sum(axis=1, dtype=np.float64))
    return next_ids, ids, support_logprobs, tail, entropy, logprobs_PV[rows, next_ids]


def _build_record(index: int, parts: list[tuple[np.ndarray, ...]], top_k: int) -> Record:
    columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    next_ids, ids, logprobs, tail, entropy, next_logprobs = columns
    return Record(
        address=RecordAddress(unit=0, index=index),
        token_ids=np.concatenate([[0], next_ids]).astype(np.int32),
        loss_mask=np.ones(_LENGTH, dtype=bool),
        signal=Signal(
            support_counts=np.full(_LENGTH, top_k, dtype=np.int32),
            support_ids=ids.astype(np.int32).ravel(),
            support_logprobs=logprobs.astype(np.float32).ravel(),
            tail_logprob=tail.astype(np.float32),
            entropy=entropy.astype(np.float32),
            next_token_logprob=next_logprobs.astype(np.float32),
        ),
        documents=(DocumentSpan(document_id=f"synthetic.txt@{index}", start=0, document_offset=0),),
    )
