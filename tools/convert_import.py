"""One run of `logitstore convert import`, and what came of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from logitstore.errors import ConfigError
from logitstore.interchange.comparison import Agreement
from logitstore.interchange.distillkit_codec import CompressionConfig
from logitstore.interchange.exporting import COMPRESSION_PATH
from logitstore.interchange.import_check import check_import
from logitstore.interchange.import_plan import ForeignTeacher, ImportSettings, build_import_plan
from logitstore.interchange.importing import DataSetImport
from logitstore.interchange.layout import LayoutName
from logitstore.interchange.signals import Normalization
from logitstore.settings import Settings, build_settings, read_settings
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import write_manifest
from logitstore.store.plan import create_plan
from logitstore.teacher.tokenizer import load_tokenizer
from tools.convert_export import describe_agreement
from tools.look import build_facts, format_bytes, format_count, format_share, show_progress

if TYPE_CHECKING:
    from rich.console import RenderableType


class ImportSummary(Settings):
    """What an import left in the store.

    Attributes:
        folder: the data set.
        store, manifest: what it became.
        layout: of the data set.
        top_k: entries kept of a position.
        normalization: what its logprobs are normalized over.
        next_hits: share of the sampled positions whose entries hold the token that comes next.
        units, units_imported: of the store, and of them by this run.
        documents, recorded_documents: rows of the data set.
        dead_letters: rows that could not be used, by reason.
        records, positions, bytes: of the store.
        is_whole_check: whether everything was compared.
        agreement: of what was compared.
    """

    folder: str
    store: str
    manifest: int | None
    layout: LayoutName
    top_k: int
    normalization: Normalization
    next_hits: float
    units: int
    units_imported: int
    documents: int
    recorded_documents: int
    dead_letters: dict[str, int]
    records: int
    positions: int
    bytes: int
    is_whole_check: bool
    agreement: Agreement


def find_compression(folder: str, layout: str, path: Path | None) -> CompressionConfig | None:
    """The compression config from its file; of compressed data without one, what DistillKit left beside the data.

    Raises:
        ConfigError: the file is missing, or not such a config.
    """
    if path is not None:
        return read_settings(CompressionConfig, path)
    if layout != LayoutName.DISTILLKIT_COMPRESSED or "*" in folder or folder.endswith(".parquet"):
        return None
    files = StoreFiles(folder)
    try:
        values = yaml.safe_load(files.read(COMPRESSION_PATH))
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"{files.url}/{COMPRESSION_PATH}: expected YAML, found something else") from None
    return build_settings(CompressionConfig, values, where=f"{files.url}/{COMPRESSION_PATH}")


def load_foreign_teacher(name: str, tokenizer: str, vocab_size: int | None) -> ForeignTeacher:
    """Who the teacher was, as far as its tokenizer tells.

    Raises:
        ConfigError: there is no such tokenizer, or its vocabulary is larger than the size given.
    """
    loaded = load_tokenizer(tokenizer)
    if vocab_size is not None and vocab_size < loaded.vocab_size:
        raise ConfigError(
            f"--vocab-size: expected at least the {loaded.vocab_size} ids of the tokenizer {tokenizer!r}, found "
            f"{vocab_size}; leave the option out, or give another tokenizer"
        )
    return ForeignTeacher(
        model=name,
        tokenizer=tokenizer,
        tokenizer_fingerprint=loaded.fingerprint,
        vocab_size=vocab_size or loaded.vocab_size,
        end_of_text_id=loaded.end_of_text_id,
    )


def run_import(
    folder: str, store_url: str, teacher: ForeignTeacher, settings: ImportSettings, *, check_all: bool, quiet: bool
) -> ImportSummary:
    """Import a data set, or the rest of it, and compare the store with it.

    Raises:
        ConfigError, CorpusError, IncompatibleStoreError, InvalidSignalError, OutsideError: see `build_import_plan`,
            `create_plan`, `DataSetImport` and `check_import`.
    """
    files = StoreFiles(store_url)
    plan = build_import_plan(folder, teacher, settings)
    plan = replace(plan, store=create_plan(files, plan.store))
    data_set = DataSetImport(files, plan)
    units = len(plan.store.build_unit_table())
    imported = []
    with show_progress("import", quiet=quiet) as report:
        for unit in range(units):
            if data_set.import_unit(unit):
                imported.append(unit)
            report(unit + 1, units)
    manifest = write_manifest(files, plan.store.compute_fingerprint(), imported)
    store = LogitStore.open(store_url, manifest=manifest.number or "latest")
    with show_progress("compare", quiet=quiet) as report:
        agreement = check_import(store, data_set, is_whole=check_all, report=report)
    statistics = store.compute_statistics()
    return ImportSummary(
        folder=folder,
        store=store.url,
        manifest=store.manifest_number,
        layout=settings.layout,
        top_k=plan.rules.top_k,
        normalization=plan.rules.normalization,
        next_hits=plan.sample.next_hits,
        units=units,
        units_imported=len(imported),
        documents=statistics.documents,
        recorded_documents=statistics.recorded_documents,
        dead_letters=statistics.dead_letters,
        records=statistics.records,
        positions=statistics.positions,
        bytes=statistics.bytes,
        is_whole_check=check_all,
        agreement=agreement,
    )


def render_import(summary: ImportSummary) -> list[RenderableType]:
    """What `logitstore convert import` shows."""
    over = {
        "vocabulary": "the vocabulary; what the entries leave is the tail",
        "support": "the entries; nothing is known of the tail, and it counts as empty",
    }
    dead = sum(summary.dead_letters.values())
    reasons = ", ".join(f"{format_count(count)} {reason}" for reason, count in summary.dead_letters.items())
    return [
        build_facts(
            [
                ("data set", f"{summary.folder}, layout {summary.layout}"),
                ("entries", f"{summary.top_k} per position, normalized over {over[summary.normalization]}"),
                ("next token", f"among the entries of {format_share(summary.next_hits)} of the sampled positions"),
                ("store", f"{summary.store}, manifest {summary.manifest}"),
                (
                    "holds",
                    f"{format_count(summary.records)} records, {format_count(summary.positions)} positions, "
                    f"{format_bytes(summary.bytes)}",
                ),
                ("units", f"{format_count(summary.units)}, {format_count(summary.units_imported)} imported now"),
                ("rows", f"{format_count(summary.documents)}, {format_count(summary.recorded_documents)} recorded"),
                ("dead letters", f"{format_count(dead)}: {reasons}; see inspect --dead-letters" if dead else None),
                *describe_agreement(summary.agreement, is_whole=summary.is_whole_check),
            ]
        )
    ]
