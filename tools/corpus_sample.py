"""A sample of a corpus: some text of units that are spread evenly over it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from logitstore.corpus.documents import DeadLetter, Document, list_corpus_files, read_documents
from logitstore.corpus.files import NUM_LISTING_THREADS, CorpusFile
from logitstore.corpus.measuring import build_unit_table, estimate_decompressed_bytes
from logitstore.corpus.parquet import read_row_group_bytes
from logitstore.corpus.units import UnitSpan, UnitTable
from logitstore.planning import CaptureSettings


@dataclass(frozen=True, kw_only=True, eq=False)
class ListedCorpus:
    """Files of a corpus, its units, and the bytes of text in every file (as unit plans count them)."""

    files: Sequence[CorpusFile]
    units: UnitTable
    text_bytes: Sequence[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class TextSample:
    """Consecutive documents of one unit, and how many bytes of the corpus they stand for."""

    documents: tuple[Document | DeadLetter, ...]
    text_bytes: int


def list_corpus(settings: CaptureSettings) -> ListedCorpus:
    """List a capture's corpus and cut it into units, as the capture itself will.

    Raises:
        ConfigError, OutsideError: see `list_corpus_files` and `build_unit_table`.
    """
    options = settings.storage_options
    files = list_corpus_files(settings.corpus, options)
    units = build_unit_table(files, settings.unit_bytes, settings.corpus, options)

    def measure(file: CorpusFile) -> int:
        if not file.bytes:
            return 0
        if file.format == "parquet":
            return sum(read_row_group_bytes(file, settings.corpus, options))
        return file.bytes if file.compression == "none" else estimate_decompressed_bytes(file, options)

    with ThreadPoolExecutor(NUM_LISTING_THREADS) as executor:
        return ListedCorpus(files=files, units=units, text_bytes=list(executor.map(measure, files)))


def choose_units(num_units: int, num_samples: int) -> list[int]:
    """Units in the middle of `num_samples` equal parts of the corpus."""
    num_samples = min(num_units, num_samples)
    return [(2 * i + 1) * num_units // (2 * num_samples) for i in range(num_samples)]


def read_text_sample(corpus: ListedCorpus, unit: int, wanted_bytes: int, settings: CaptureSettings) -> TextSample:
    """Read about `wanted_bytes` of text from the start of a unit; a document is never cut.

    Raises:
        ConfigError, IncompatibleStoreError, OutsideError: see `read_documents`.
    """
    documents: list[Document | DeadLetter] = []
    num_bytes = 0
    for span in corpus.units.spans(unit):
        for document, covered in _read_span(corpus, span, wanted_bytes - num_bytes, settings):
            if document is not None:
                documents.append(document)
            num_bytes += covered
        if num_bytes >= wanted_bytes:
            break
    return TextSample(documents=tuple(documents), text_bytes=num_bytes)


def _read_span(
    corpus: ListedCorpus, span: UnitSpan, wanted_bytes: int, settings: CaptureSettings
) -> Iterator[tuple[Document | DeadLetter | None, int]]:
    """Documents from the start of a span, each with the bytes that it stands for; stops at `wanted_bytes`."""
    file, options = corpus.files[span.file_index], settings.storage_options
    if file.format == "jsonl":
        # The lines that begin in a range of bytes stand for the whole range, whatever they are wrapped in.
        end = corpus.text_bytes[span.file_index] if span.stop is None else span.stop
        stop = min(max(end, span.start + 1), span.start + wanted_bytes)
        yield None, stop - span.start
        for document in read_documents(file, span.start, stop, settings.corpus, options):
            yield document, 0
        return
    num_bytes = 0
    for document in read_documents(file, span.start, span.stop, settings.corpus, options):
        if file.format == "text":
            covered = corpus.text_bytes[span.file_index]
        else:
            covered = len(document.text.encode()) if isinstance(document, Document) else 0
        yield document, covered
        num_bytes += covered
        if num_bytes >= wanted_bytes:
            return
