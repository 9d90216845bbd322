from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitstore.corpus.documents import DeadLetter, Document
from logitstore.corpus.sequences import Sequence, SequenceBuild, SequenceSettings, build_sequences
from logitstore.errors import ShapeError

END_OF_TEXT = 0
VOCAB_SIZE = 1000


def encode(texts: list[str]) -> list[list[int]]:
    """One token per word, the word being its id."""
    return [[int(word) for word in text.split()] for text in texts]


def build(items: list[Document | DeadLetter], **settings: object) -> tuple[list[Sequence], SequenceBuild]:
    sequences = build_sequences(
        items,
        encode=encode,
        end_of_text_id=END_OF_TEXT,
        vocab_size=VOCAB_SIZE,
        settings=SequenceSettings.model_validate(settings),
    )
    return list(sequences), sequences


def build_documents(lengths: list[int]) -> list[Document | DeadLetter]:
    """Documents whose token `i` is unique in the corpus; id 0 is end-of-text."""
    starts = np.cumsum([1, *lengths])
    return [
        Document(f"d{n}", " ".join(str(start + i) for i in range(length)))
        for n, (start, length) in enumerate(zip(starts, lengths, strict=False))
    ]


def tokens_of(item: Document | DeadLetter) -> list[int]:
    assert isinstance(item, Document)
    return [*encode([item.text])[0], END_OF_TEXT]


LENGTHS = st.lists(st.integers(0, 30), max_size=25)


@given(lengths=LENGTHS, length=st.integers(1, 40), mode=st.sampled_from(["pack", "document"]), data=st.data())
def test_sequences_of_any_documents_cover_the_run_with_right_spans(
    lengths: list[int], length: int, mode: str, data: st.DataObject
) -> None:
    items = build_documents(lengths)
    overlong = data.draw(st.sampled_from(["split", "dead_letter"]))
    sequences, counts = build(items, mode=mode, length=length, overlong=overlong)
    usable = {
        item.document_id: tokens_of(item)
        for item, n in zip(items, lengths, strict=True)
        if n >= 1 and (overlong == "split" or n <= length)
    }
    assert counts.num_documents == len(items)
    assert counts.num_recorded_documents == len(usable)
    assert counts.num_documents == counts.num_recorded_documents + len(counts.dead_letters)
    check_spans(sequences, usable)
    if mode == "pack":
        check_run(sequences, [token for tokens in usable.values() for token in tokens], length)
    else:
        for document_id, tokens in usable.items():
            check_run([s for s in sequences if s.documents[0].document_id == document_id], tokens, length)
        assert all(len(sequence.documents) == 1 for sequence in sequences)


def check_run(sequences: list[Sequence], tokens: list[int], length: int) -> None:
    """All but the last are full, neighbours share one token, and without it they join to the run."""
    joined: list[int] = []
    for sequence in sequences:
        token_ids = sequence.token_ids.tolist()
        assert len(token_ids) == sequence.num_positions + 1 >= 2
        assert not joined or joined[-1] == token_ids[0]
        joined += token_ids[bool(joined) :]
    assert joined == tokens
    assert all(sequence.num_positions == length for sequence in sequences[:-1])
    assert all(sequence.num_positions <= length for sequence in sequences)


def check_spans(sequences: list[Sequence], tokens_of_document: dict[str, list[int]]) -> None:
    for sequence in sequences:
        assert sequence.token_ids.dtype == np.int32
        assert sequence.loss_mask.dtype == bool
        assert sequence.loss_mask.all()
        starts = [span.start for span in sequence.documents]
        assert starts[0] == 0
        stops = [*starts[1:], len(sequence.token_ids)]
        for span, stop in zip(sequence.documents, stops, strict=True):
            assert span.start < stop
            tokens = tokens_of_document[span.document_id]
            expected = tokens[span.document_offset : span.document_offset + stop - span.start]
            assert sequence.token_ids[span.start : stop].tolist() == expected


def test_pack_of_two_documents_overlaps_by_the_token_that_was_last() -> None:
    sequences, _ = build(build_documents([3, 4]), length=5)
    assert [sequence.token_ids.tolist() for sequence in sequences] == [[1, 2, 3, 0, 4, 5], [5, 6, 7, 0]]
    spans = [[(s.document_id, s.start, s.document_offset) for s in sequence.documents] for sequence in sequences]
    assert spans == [[("d0", 0, 0), ("d1", 4, 0)], [("d1", 0, 1)]]


def test_document_longer_than_the_length_is_split_with_offsets() -> None:
    sequences, counts = build(build_documents([7]), mode="document", length=3)
    assert [sequence.token_ids.tolist() for sequence in sequences] == [[1, 2, 3, 4], [4, 5, 6, 7], [7, 0]]
    assert [sequence.documents[0].document_offset for sequence in sequences] == [0, 3, 6]
    assert counts.num_recorded_documents == 1


@pytest.mark.parametrize("mode", ["pack", "document"])
def test_document_of_exactly_the_length_is_not_overlong(mode: str) -> None:
    sequences, counts = build(build_documents([4, 5]), mode=mode, length=4, overlong="dead_letter")
    assert [sequence.token_ids.tolist() for sequence in sequences] == [[1, 2, 3, 4, 0]]
    (letter,) = counts.dead_letters
    assert (letter.document_id, letter.reason) == ("d1", "too_long")
    assert letter.detail == "expected at most 4 tokens, found 5"


@pytest.mark.parametrize(
    ("mode", "minimum", "short"), [("pack", 3, [0]), ("document", 3, [0, 1, 2]), ("document", 1, [0])]
)
def test_document_shorter_than_the_minimum_is_a_dead_letter(mode: str, minimum: int, short: list[int]) -> None:
    _, counts = build(build_documents([0, 1, 2, 3]), mode=mode, min_positions=minimum)
    assert [(letter.document_id, letter.reason) for letter in counts.dead_letters] == [
        (f"d{n}", "too_short") for n in short
    ]


@pytest.mark.parametrize("bad_id", [-1, VOCAB_SIZE, 2**40])
def test_document_with_id_outside_the_vocabulary_is_a_dead_letter(bad_id: int) -> None:
    items = [Document("a", "1 2"), Document("b", f"3 {bad_id} 4"), Document("c", "5")]
    (sequence,), counts = build(items)
    assert sequence.token_ids.tolist() == [1, 2, 0, 5, 0]
    (letter,) = counts.dead_letters
    assert (letter.document_id, letter.reason) == ("b", "token_out_of_range")
    assert letter.detail == f"token 1: expected an id below {VOCAB_SIZE}, found {bad_id}"


def test_dead_letters_stay_in_corpus_order_across_both_kinds() -> None:
    items = [
        Document("a", ""),
        DeadLetter(document_id="b", reason="empty", detail=""),
        Document("c", ""),
        *build_documents([2]),
    ]
    _, counts = build(items)
    assert [letter.document_id for letter in counts.dead_letters] == ["a", "b", "c"]
    assert (counts.num_documents, counts.num_recorded_documents) == (4, 1)


@pytest.mark.parametrize("items", [[], [DeadLetter(document_id="a", reason="empty", detail="")]])
def test_sequences_of_nothing_usable_are_none(items: list[Document | DeadLetter]) -> None:
    sequences, counts = build(items)
    assert sequences == []
    assert counts.num_documents == len(counts.dead_letters) == len(items)


def test_sequences_are_made_while_documents_come_in() -> None:
    taken = 0

    def documents() -> list[Document]:
        nonlocal taken
        for n in range(10_000):
            taken += 1
            yield Document(f"d{n}", "1 2 3")

    sequences = build_sequences(
        documents(), encode=encode, end_of_text_id=0, vocab_size=10, settings=SequenceSettings(length=8)
    )
    next(iter(sequences))
    assert taken < 200
    assert len(list(sequences)) > 1000
    assert sequences.num_recorded_documents == 10_000


def test_encode_that_loses_a_text_is_refused() -> None:
    sequences = build_sequences(
        build_documents([2, 2]),
        encode=lambda texts: [[1]],
        end_of_text_id=0,
        vocab_size=10,
        settings=SequenceSettings(),
    )
    with pytest.raises(ShapeError, match="expected token ids of 2 texts, found 1"):
        list(sequences)
