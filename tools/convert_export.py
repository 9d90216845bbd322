"""One run of `logitstore convert export`, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from logitstore.errors import InvalidSignalError
from logitstore.interchange.comparison import Agreement
from logitstore.interchange.distillkit_codec import CompressionConfig
from logitstore.interchange.export_check import check_export
from logitstore.interchange.exporting import Export, ExportSettings
from logitstore.settings import Settings, read_settings
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from tools.look import build_facts, count_things, format_bytes, format_count, show_progress

if TYPE_CHECKING:
    from rich.console import RenderableType


class ExportSummary(Settings):
    """What an export wrote.

    Attributes:
        store, manifest: what was exported.
        folder: where it is.
        settings: with the values that were filled in.
        records, positions: in the data set.
        files, bytes: of the data set, all of it.
        files_written: by this run.
        is_whole_check: whether everything was compared.
        agreement: of what was compared.
    """

    store: str
    manifest: int | None
    folder: str
    settings: ExportSettings
    records: int
    positions: int
    files: int
    bytes: int
    files_written: int
    is_whole_check: bool
    agreement: Agreement


def read_compression(path: Path | None) -> CompressionConfig | None:
    """DistillKit's compression config from its file, None for no file.

    Raises:
        ConfigError: the file is missing, or not such a config.
    """
    return None if path is None else read_settings(CompressionConfig, path)


def run_export(
    store_url: str, folder_url: str, settings: ExportSettings, *, manifest: int | None, check_all: bool, quiet: bool
) -> ExportSummary:
    """Export a store, or the rest of it, and compare what was written with it.

    Raises:
        ConfigError, StoreNotFoundError, CorruptShardError, InvalidSignalError, OutsideError: see `Export` and
            `check_export`.
    """
    store = LogitStore.open(store_url, manifest=manifest or "latest")
    folder = StoreFiles(folder_url)
    export = Export(store, folder, settings)
    with show_progress("export", quiet=quiet) as report:
        written = export.write(report)
    with show_progress("compare", quiet=quiet) as report:
        agreement = check_export(export, is_whole=check_all, report=report)
    files = folder.list("data")
    return ExportSummary(
        store=store.url,
        manifest=store.manifest_number,
        folder=folder.url,
        settings=export.settings,
        records=len(store),
        positions=store.compute_statistics().positions,
        files=len(files),
        bytes=sum(file.bytes for file in files),
        files_written=written,
        is_whole_check=check_all,
        agreement=agreement,
    )


def render_export(summary: ExportSummary) -> list[RenderableType]:
    """What `logitstore convert export` shows."""
    settings = summary.settings
    return [
        build_facts(
            [
                ("store", f"{summary.store}, manifest {summary.manifest}"),
                ("data set", f"{summary.folder}, layout {settings.layout}, {settings.top_k} entries per position"),
                ("holds", f"{format_count(summary.records)} records, {format_count(summary.positions)} positions"),
                (
                    "",
                    f"{count_things(summary.files, 'file')}, {format_bytes(summary.bytes)}; "
                    f"{format_count(summary.files_written)} written now",
                ),
                *describe_agreement(summary.agreement, is_whole=summary.is_whole_check),
            ]
        )
    ]


def describe_agreement(agreement: Agreement, *, is_whole: bool) -> list[tuple[str, str | None]]:
    """Facts about a comparison, to be shown."""
    if not agreement.positions:
        return [("compared", "nothing: there is no position")]
    of_what = "every position" if is_whole else "a sample"
    promise: str | None
    if agreement.beyond_bound is None:
        promise = "none: a polynomial has no bound"
    elif agreement.beyond_bound:
        promise = f"broken by {format_count(agreement.beyond_bound)} entries; {agreement.first_beyond_bound}"
    else:
        promise = "kept by every entry"
    return [
        ("compared", f"{of_what}: {format_count(agreement.positions)} positions"),
        ("", f"logprobs off by at most {agreement.largest_error:.3g} nats"),
        ("", f"KL {agreement.mean_kl:.3g} nats on average, {agreement.largest_kl:.3g} at most"),
        ("bound", promise),
    ]


def check_agreement(agreement: Agreement, what: str) -> None:
    """Hold what was written to the bound of its layout or codec.

    Raises:
        InvalidSignalError: entries differ by more.
    """
    if agreement.beyond_bound:
        raise InvalidSignalError(
            f"{what}: expected what it was made from, but for rounding, found "
            f"{count_things(agreement.beyond_bound, 'value')} beyond the bound, the first: "
            f"{agreement.first_beyond_bound}; write it again into another place, and do not use this one"
        )
