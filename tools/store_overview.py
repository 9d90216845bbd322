"""A store at a glance: what it holds, what it costs, and how sure the teacher was."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from logitstore.settings import Settings
from logitstore.shard.summary import ENTROPY_BIN_NATS
from logitstore.store.extension import build_extension_path
from logitstore.store.logit_store import StoreStatistics
from logitstore.store.manifest import build_manifest_path
from logitstore.store.plan import PLAN_PATH
from logitstore.teacher.protocol import Method, TeacherIdentity
from tools.look import (
    build_facts,
    build_histogram,
    build_table,
    format_bytes,
    format_count,
    format_entropy,
    format_loss,
    format_share,
)
from tools.method_text import describe_method
from tools.opened_store import OpenedStore, describe_manifest, open_readable
from tools.status_view import describe_documents

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


class SourceFigures(Settings):
    """What a store holds of one corpus source; `teacher_loss` in nats per token."""

    name: str
    records: int
    positions: int
    documents: int
    teacher_loss: float | None


class StoreOverview(Settings):
    """A store at one manifest, or as committed now.

    Attributes:
        store: its address.
        manifest: number of the manifest that lists exactly this, None where none does.
        newer_units: committed units that the newest manifest does not list.
        teacher, method, codec, sequences: from the plan; `codec` is its kind, `sequence_length` in positions.
        units, units_planned: committed, and planned.
        records, positions, taught_positions: sequences, their positions, and those that may be taught.
        bytes: of everything that makes up the store: shards, commits, manifest, plan.
        shard_bytes: of the shards alone.
        bytes_per_position: all `bytes` over all positions.
        columns: compressed bytes of each column in the shards.
        other_bytes: what is in no column: footers and headers of shards, commits, manifest, plan.
        mean_support: entries per position.
        mean_entropy: nats, of the teacher's whole distribution; None where that is unknown.
        mean_tail_mass: probability outside of the support; where supports are drawn, outside of what is kept of them.
        teacher_loss, teacher_perplexity: on the tokens that come next; tokens held impossible are left out and counted
            in `impossible_tokens`; None where they are unknown.
        entropy_histogram: positions per bin of half a nat, the last bin open.
        tail_histogram: positions with tail mass in (10^-(i+1), 10^-i]; the last bin holds everything below.
        documents, recorded_documents, dead_letters: read; used; not used, by reason.
        label_field: what the labels of documents were read from; None where they have none.
        sources: by corpus source.
        unreadable: what is damaged and not counted, a line each.
    """

    store: str
    manifest: int | None
    newer_units: int
    teacher: TeacherIdentity
    method: Method
    codec: str
    sequence_mode: str
    sequence_length: int
    created_at: str
    units: int
    units_planned: int
    records: int
    positions: int
    taught_positions: int
    bytes: int
    shard_bytes: int
    bytes_per_position: float
    columns: dict[str, int]
    other_bytes: int
    mean_support: float
    mean_entropy: float | None
    mean_tail_mass: float
    teacher_loss: float | None
    teacher_perplexity: float | None
    impossible_tokens: int
    entropy_histogram: tuple[int, ...]
    tail_histogram: tuple[int, ...]
    documents: int
    recorded_documents: int
    dead_letters: dict[str, int]
    label_field: str | None
    sources: tuple[SourceFigures, ...]
    unreadable: tuple[str, ...]


def read_overview(url: str, manifest: int | None = None) -> StoreOverview:
    """Look at a store; reads plan, manifest and commits that are newer, no shard. Of a damaged one what is whole.

    Raises:
        StoreNotFoundError, IncompatibleStoreError, CorruptShardError: there is no store, or it cannot be read.
    """
    opened = open_readable(url, manifest)
    store, plan = opened.store, opened.store.plan
    statistics = store.compute_statistics()
    num_bytes = statistics.bytes + _count_bookkeeping_bytes(opened)
    positions = max(1, statistics.positions)
    return StoreOverview(
        store=store.url,
        manifest=opened.manifest,
        newer_units=opened.newer_units,
        teacher=plan.teacher,
        method=plan.method,
        codec=plan.shard.codec.kind,
        sequence_mode=plan.sequences.mode,
        sequence_length=plan.sequences.length,
        created_at=plan.created_at,
        units=len(store.manifest.units),
        units_planned=len(plan.build_unit_table()),
        records=statistics.records,
        positions=statistics.positions,
        taught_positions=statistics.taught_positions,
        bytes=num_bytes,
        shard_bytes=statistics.bytes,
        bytes_per_position=num_bytes / positions,
        columns=statistics.column_bytes,
        other_bytes=num_bytes - sum(statistics.column_bytes.values()),
        mean_support=statistics.support_entries / positions,
        mean_entropy=statistics.mean_entropy,
        mean_tail_mass=statistics.mean_tail_mass,
        teacher_loss=statistics.teacher_loss,
        teacher_perplexity=None if statistics.teacher_loss is None else math.exp(min(statistics.teacher_loss, 700.0)),
        impossible_tokens=statistics.impossible_tokens,
        entropy_histogram=statistics.entropy_histogram,
        tail_histogram=statistics.tail_histogram,
        documents=statistics.documents,
        recorded_documents=statistics.recorded_documents,
        dead_letters=statistics.dead_letters,
        label_field=plan.corpus.label_field,
        sources=tuple(_describe_source(name, store.compute_statistics(name)) for name in store.list_sources()),
        unreadable=opened.unreadable,
    )


def _count_bookkeeping_bytes(opened: OpenedStore) -> int:
    """Bytes of plan, with all that was added to it, commits and manifest."""
    names = {PLAN_PATH, *(build_extension_path(2 + i) for i in range(len(opened.store.plan.extensions)))}
    if opened.manifest is not None:
        names.add(build_manifest_path(opened.manifest))
    is_shown = np.isin(opened.commits.units, opened.store.manifest.units)
    of_commits = int(opened.commits.bytes[is_shown].sum())
    return of_commits + sum(file.bytes for file in opened.files.list("") if file.name in names)


def _describe_source(name: str, statistics: StoreStatistics) -> SourceFigures:
    return SourceFigures(
        name=name,
        records=statistics.records,
        positions=statistics.positions,
        documents=statistics.documents,
        teacher_loss=statistics.teacher_loss,
    )


def render_overview(overview: StoreOverview) -> list[RenderableType]:
    """What `logitstore inspect STORE` shows."""
    parts: list[RenderableType] = [_build_head(overview)]
    if overview.positions:
        parts.append(_build_columns(overview))
        parts.append(_build_histograms(overview))
    if len(overview.sources) > 1:
        rows = [
            (
                source.name,
                format_count(source.records),
                format_count(source.positions),
                format_count(source.documents),
                "unknown" if source.teacher_loss is None else f"{source.teacher_loss:.3f}",
            )
            for source in overview.sources
        ]
        columns = ["source", "#records", "#positions", "#documents", "#teacher's loss"]
        parts.append(build_table("Corpus sources", columns, rows))
    return parts


def _build_head(overview: StoreOverview) -> Table:
    return build_facts(list_facts(overview))


def list_facts(overview: StoreOverview) -> list[tuple[str, object]]:
    """What a store is and what it says in the mean: names and values, for people."""
    teacher = overview.teacher
    facts: list[tuple[str, object]] = [
        ("store", overview.store),
        ("manifest", describe_manifest(overview.manifest, overview.newer_units)),
        ("units", f"{format_count(overview.units)} of {format_count(overview.units_planned)} committed"),
        ("teacher", f"{teacher.model} ({teacher.architecture}, {teacher.dtype}, {teacher.engine})"),
        ("vocabulary", f"{format_count(teacher.vocab_size)} ids"),
        ("method", describe_method(overview.method)),
        ("codec", overview.codec),
        ("sequences", f"{overview.sequence_mode}, {format_count(overview.sequence_length)} positions at most"),
        ("records", format_count(overview.records)),
        ("positions", _describe_positions(overview)),
        ("documents", _describe_documents(overview)),
        ("bytes", f"{format_bytes(overview.bytes)}, everything included"),
    ]
    if overview.positions:
        facts += [
            ("per position", f"{overview.bytes_per_position:.1f} bytes, {overview.mean_support:.1f} support entries"),
            ("tail mass", _describe_tail(overview)),
            ("entropy", format_entropy(overview.mean_entropy)),
            ("teacher's loss", _describe_loss(overview)),
        ]
    return facts


def _describe_documents(overview: StoreOverview) -> str:
    labels = f"; labels from {overview.label_field!r}" if overview.label_field is not None else ""
    return describe_documents(overview.documents, overview.dead_letters) + labels


def _describe_positions(overview: StoreOverview) -> str:
    if overview.taught_positions == overview.positions:
        return format_count(overview.positions)
    share = overview.taught_positions / max(1, overview.positions)
    return f"{format_count(overview.positions)}, {format_share(share)} of them taught"


def _describe_tail(overview: StoreOverview) -> str:
    share = format_share(overview.mean_tail_mass)
    if overview.method.kind == "sample":
        return "all of the probability is drawn from, nothing kept"
    if overview.method.is_drawn:
        return f"{share} of the probability is drawn from, the rest kept"
    return f"{share} of the probability lies outside the support"


def _describe_loss(overview: StoreOverview) -> str:
    impossible = ""
    if overview.impossible_tokens:
        impossible = f", {format_count(overview.impossible_tokens)} tokens held impossible left out"
    return format_loss(overview.teacher_loss) + impossible


def _build_columns(overview: StoreOverview) -> Table:
    columns = ["column", "#bytes", "#share", "#bytes per position"]
    return build_table("Where the bytes are", columns, list_column_rows(overview))


def list_column_rows(overview: StoreOverview) -> list[tuple[str, str, str, str]]:
    """Name, bytes, share of all bytes, and bytes per position of every column, the largest first; the rest last."""
    rows = [
        (name, format_bytes(size), format_share(size / overview.bytes), f"{size / overview.positions:.2f}")
        for name, size in sorted(overview.columns.items(), key=lambda item: -item[1])
    ]
    other = overview.other_bytes
    rows.append(
        (
            "footers, commits, manifest",
            format_bytes(other),
            format_share(other / overview.bytes),
            f"{other / overview.positions:.2f}",
        )
    )
    return rows


def _build_histograms(overview: StoreOverview) -> Table:
    """Entropy, where it is known at all, and tail mass, where it is not 1 by the method, side by side."""
    from rich.table import Table

    histograms = []
    if overview.method.kind != "sample":
        tails = overview.tail_histogram
        tail_labels = [f"10^-{i + 1} to {f'10^-{i}' if i else '1'}" for i in range(len(tails) - 1)]
        tail_labels.append(f"below 10^-{len(tails) - 1}")
        title = "Probability drawn from" if overview.method.is_drawn else "Probability outside the support"
        histograms.append(build_histogram(title, tail_labels, tails))
    if any(overview.entropy_histogram):
        histograms.insert(0, _build_entropy_histogram(overview))
    table = Table.grid(padding=(0, 4))
    table.add_row(*histograms)
    return table


def _build_entropy_histogram(overview: StoreOverview) -> Table:
    bins_per_nat = round(1 / ENTROPY_BIN_NATS)
    counts = overview.entropy_histogram
    nats = [sum(counts[i : i + bins_per_nat]) for i in range(0, len(counts), bins_per_nat)]
    while len(nats) > 1 and not nats[-1]:
        nats.pop()
    labels = [f"{i} to {i + 1}" for i in range(len(nats))]
    if len(nats) * bins_per_nat == len(counts):
        labels[-1] = f"{len(nats) - 1} and more"
    return build_histogram("Entropy of the teacher, nats", labels, nats)
