"""Documents of a corpus file, each either usable text or a dead letter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from pydantic import Field

from logitstore.corpus.blocks import read_blocks
from logitstore.corpus.chat import Conversation
from logitstore.corpus.files import CorpusFile, CorpusSettings, StorageOptions, list_corpus_files
from logitstore.corpus.given_ids import GivenIds
from logitstore.corpus.lines import Line, count_newlines, iterate_lines
from logitstore.corpus.parquet import read_rows
from logitstore.corpus.parsing import ParsedDocument, check_size, parse_json_line, parse_plain_text
from logitstore.corpus.rejection import RejectedDocumentError, RejectionReason
from logitstore.settings import Settings

__all__ = [
    "CorpusFile",
    "CorpusSettings",
    "DeadLetter",
    "DeadLetterReason",
    "Document",
    "Place",
    "list_corpus_files",
    "read_documents",
]

DeadLetterReason = Literal[
    RejectionReason,
    "too_short",
    "token_out_of_range",
    "invalid_signal",
    "out_of_memory",  # the teacher's, with nothing else to score beside it
    "engine_died",  # of it, twice, with nothing else to score beside it
    "empty_answer",
    "refused",  # by an endpoint, which says why
    "unmapped_token",  # an endpoint names a token that is none of the tokenizer's
    "prompt_differs",  # from what an endpoint made of it
]

LONGEST_DETAIL = 200


class DeadLetter(Settings):
    """A document that cannot be used; kept in the commit of its unit.

    Attributes:
        document_id: file and place: `path@byte` for a line of JSON (decompressed offset), `path#row` for a row of
            Parquet, the path for a text file. Never the value of the id field, so that the file can be found.
        reason: what is wrong, one word of a closed list.
        detail: line number and the rest, at most 200 characters.
    """

    document_id: str
    reason: DeadLetterReason
    detail: str = Field(max_length=LONGEST_DETAIL)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a document stands: its address, and a description that may cost a read of the file."""

    address: str
    describe: Callable[[], str]

    def reject(self, reason: DeadLetterReason, detail: str) -> DeadLetter:
        return _build_dead_letter(self.address, reason, f"{self.describe()}: {detail}")


@dataclass(frozen=True, slots=True)
class Document:
    """One item of the corpus.

    Attributes:
        document_id: value of the id field, or file and place (see `DeadLetter`).
        text: not empty, encodable as UTF-8; of a conversation, what is said in it; of token ids, they as numbers.
        place: where it was read, None for text that came from elsewhere.
        conversation: of a chat corpus, None of any other.
        given: of a corpus of token ids, None of any other.
        label: value of the label field, "" where the document has none; None where the corpus has no labels.
    """

    document_id: str
    text: str
    place: Place | None = None
    conversation: Conversation | None = None
    given: GivenIds | None = None
    label: str | None = None

    def reject(self, reason: DeadLetterReason, detail: str) -> DeadLetter:
        """The dead letter of this document; names file and line where it came from a file."""
        if self.place is None:
            return _build_dead_letter(self.document_id, reason, detail)
        return self.place.reject(reason, detail)


def read_documents(
    file: CorpusFile,
    start: int,
    stop: int | None,
    settings: CorpusSettings,
    storage_options: StorageOptions | None = None,
) -> Iterator[Document | DeadLetter]:
    """Yield every document of a part of a file, in file order; what cannot be used comes as a dead letter.

    Consecutive parts give each document exactly once, wherever they are cut, under the same ids.

    Args:
        file: as listed by `list_corpus_files`.
        start, stop: half-open range; stop None is the end. Lines of JSON: bytes (after decompression), the lines that
            begin there. Parquet: row groups. Text: bytes, and the document belongs to the part that holds byte 0.
        settings: fields and limits.
        storage_options: passed to the filesystem.
    Raises:
        ConfigError: a column is missing, compressed or Parquet data is damaged, or the file is gone.
        IncompatibleStoreError: the file has another size than when it was listed.
        OutsideError: the filesystem cannot be read.
    """
    if file.bytes == 0:
        return iter(())
    if file.format == "jsonl":
        return _read_json_lines(file, start, stop, settings, storage_options)
    if file.format == "parquet":
        return _from_rows(file, read_rows(file, start, stop, settings, storage_options))
    return _read_text(file, settings, storage_options) if start == 0 else iter(())


def _read_json_lines(
    file: CorpusFile, start: int, stop: int | None, settings: CorpusSettings, storage_options: StorageOptions | None
) -> Iterator[Document | DeadLetter]:
    blocks = read_blocks(file, max(0, start - 1), storage_options)
    numbers: _LineNumbers | None = None
    for line in iterate_lines(blocks, start, stop, settings.max_document_bytes):
        numbers = numbers or _LineNumbers(file, line.offset, storage_options)
        place = Place(f"{file.path}@{line.offset}", partial(numbers.describe, line))
        try:
            check_size(line.num_bytes, settings.max_document_bytes)
            assert line.content is not None
            parsed = parse_json_line(line.content, is_first=line.offset == 0, settings=settings)
        except RejectedDocumentError as rejection:
            yield place.reject(rejection.reason, rejection.detail)
        else:
            yield _build_document(parsed, place)


class _LineNumbers:
    """Numbers of the lines of a part of a file; the lines before the part are counted when first needed."""

    def __init__(self, file: CorpusFile, first_offset: int, storage_options: StorageOptions | None) -> None:
        self._file = file
        self._first_offset = first_offset
        self._storage_options = storage_options
        self._num_before: int | None = None

    def describe(self, line: Line) -> str:
        if self._num_before is None:
            blocks = read_blocks(self._file, 0, self._storage_options) if self._first_offset else iter(())
            self._num_before = count_newlines(blocks, self._first_offset)
        return f"line {self._num_before + line.index + 1}, byte {line.offset}"


def _from_rows(
    file: CorpusFile, rows: Iterator[tuple[int, ParsedDocument | RejectedDocumentError]]
) -> Iterator[Document | DeadLetter]:
    for row, parsed in rows:
        place = Place(f"{file.path}#{row}", partial("row {}".format, row))
        if isinstance(parsed, RejectedDocumentError):
            yield place.reject(parsed.reason, parsed.detail)
        else:
            yield _build_document(parsed, place)


def _build_document(parsed: ParsedDocument, place: Place) -> Document:
    content, document_id = parsed.content, parsed.name or place.address
    if isinstance(content, GivenIds):
        text = " ".join(map(str, content.token_ids.tolist()))
        return Document(document_id, text, place, given=content, label=parsed.label)
    if isinstance(content, Conversation):
        return Document(document_id, content.text, place, content, label=parsed.label)
    return Document(document_id, content, place, label=parsed.label)


def _read_text(
    file: CorpusFile, settings: CorpusSettings, storage_options: StorageOptions | None
) -> Iterator[Document | DeadLetter]:
    place = Place(file.path, lambda: "whole file")
    limit = settings.max_document_bytes
    try:
        if file.compression == "none":
            check_size(file.bytes, limit)
        content = bytearray()
        for block in read_blocks(file, 0, storage_options):
            content += block
            check_size(len(content), limit)
        text = parse_plain_text(bytes(content))
    except RejectedDocumentError as rejection:
        yield place.reject(rejection.reason, rejection.detail)
    else:
        yield Document(file.path, text, place, label=None if settings.label_field is None else "")


def _build_dead_letter(address: str, reason: DeadLetterReason, detail: str) -> DeadLetter:
    printable = detail.encode("utf-8", "backslashreplace").decode()
    if len(printable) > LONGEST_DETAIL:
        printable = printable[: LONGEST_DETAIL - 1] + "…"
    return DeadLetter(document_id=address, reason=reason, detail=printable)
