"""Two stores over the same corpus, position by position: how far apart their teachers, methods or codecs are."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from logitstore.comparison import SignalDifferences, compare_signals
from logitstore.settings import Settings
from logitstore.store.aligned_records import AlignedBatch, AlignedRecord
from logitstore.store.aligned_stores import AlignedStores
from logitstore.store.logit_store import LogitStore
from tools.method_text import describe_method
from tools.opened_store import open_store
from tools.record_view import PositionView, cut_text, view_position
from tools.token_text import FindText, load_find_text

_SHARES = (0.5, 0.9, 0.99, 0.999)
# Of the histogram that quantiles are read from: 1e-9 to 1e3 nats in steps of 12%.
_BINS_PER_DECADE, _FIRST_DECADE, _LAST_DECADE = 20, -9, 3
_INFINITE_BIN = (_LAST_DECADE - _FIRST_DECADE) * _BINS_PER_DECADE + 1
_CONTEXT_POSITIONS = 12
_CANDIDATES = 3


class ComparedStore(Settings):
    """One side.

    Attributes:
        store, manifest: its address, and the number of the manifest; None where none lists what was compared.
        teacher, engine, method, codec: from the plan.
        left_out: records that the other store does not have.
        teacher_loss: nats per token, over the compared positions; None where it is unknown.
        mean_entropy: nats, likewise.
    """

    store: str
    manifest: int | None
    teacher: str
    engine: str
    method: str
    codec: str
    left_out: int
    teacher_loss: float | None
    mean_entropy: float | None


class Distances(Settings):
    """Distances over a number of positions; see `logitstore.comparison` for which ones.

    Attributes:
        positions: compared: taught in both stores, with kept tokens in both.
        kl, reverse_kl: nats, the means of KL(first ‖ second) and KL(second ‖ first) over positions where it is finite.
        infinite: positions where either is not.
        total_variation: the mean.
        agreement: share of positions at which both hold the same token likeliest; None where a store keeps other
            tokens than the likeliest.
    """

    positions: int
    kl: float
    reverse_kl: float
    infinite: int
    total_variation: float
    agreement: float | None


class DifferentPosition(Settings):
    """A position at which the stores are far apart.

    Attributes:
        record: unit/index.
        kl: nats, KL(first ‖ second); None where it is infinite.
        context: the text before the next token, None without a tokenizer.
        first, second: what each store says there.
    """

    record: str
    kl: float | None
    context: str | None
    first: PositionView
    second: PositionView


class StoreDiff(Settings):
    """How far two stores are apart.

    Attributes:
        first, second: the stores.
        records: that were compared.
        positions_taught: of these records, in both.
        distances: over all of them.
        kl_quantiles: nats, by share of positions, to 12%; None where that is infinite.
        sources: distances by corpus source.
        most_different: the positions of the largest KL, largest first.
        tokenizer_trouble: why there is no text, where there is none.
    """

    first: ComparedStore
    second: ComparedStore
    records: int
    positions_taught: int
    distances: Distances
    kl_quantiles: dict[str, float | None]
    sources: dict[str, Distances]
    most_different: tuple[DifferentPosition, ...]
    tokenizer_trouble: str | None


def compare_stores(
    urls: tuple[str, str],
    manifests: tuple[int | None, int | None] = (None, None),
    *,
    max_records: int | None = None,
    top: int = 10,
    tokenizer: str | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> StoreDiff:
    """Compare two stores.

    Args:
        urls: of the stores.
        manifests: their numbers; None for what is committed now.
        max_records: compare row groups evenly spread over the stores, as many as hold so many records; None for all.
        top: how many of the most different positions to list.
        tokenizer: folder or name of a tokenizer in place of the first teacher's.
        report: called with row groups done and to do.

    Raises:
        IncompatibleStoreError: the stores are not of the same sequences, or have no records in common.
        StoreNotFoundError, CorruptShardError, OutsideError: a store cannot be read.
    """
    opened = [open_store(url, manifest) for url, manifest in zip(urls, manifests, strict=True)]
    aligned = AlignedStores([one.store for one in opened])
    teacher = aligned.stores[0].plan.teacher
    name = tokenizer or teacher.tokenizer_name
    find_text, trouble = load_find_text(name, teacher, may_fetch=tokenizer is not None)
    plan = aligned.stores[0].plan
    units = plan.build_unit_table()
    is_likeliest_kept = all(store.plan.is_likeliest_kept for store in aligned.stores)
    sums, by_source = _Sums(), dict[str, _Sums]()
    most_different = _MostDifferent(top, find_text)
    chosen = choose_row_groups(aligned.row_group_records, max_records)
    records = 0
    for done, row_group in enumerate(chosen, start=1):
        batch = aligned.read_row_group(int(row_group))
        differences = compare_signals(batch, batch.further[0])
        source = units.source_of(int(aligned.row_group_units[row_group]), plan.files)
        for one in (sums, by_source.setdefault(source, _Sums())):
            one.add(batch, differences)
        most_different.add(batch, differences)
        records += len(batch)
        report(done, len(chosen))
    first, second = (
        _describe_store(one.store, one.manifest, left_out, sums.losses[side], sums.entropies[side])
        for side, (one, left_out) in enumerate(zip(opened, aligned.left_out, strict=True))
    )
    return StoreDiff(
        first=first,
        second=second,
        records=records,
        positions_taught=sums.taught,
        distances=sums.build(is_likeliest_kept=is_likeliest_kept),
        kl_quantiles=sums.find_quantiles(),
        sources={source: one.build(is_likeliest_kept=is_likeliest_kept) for source, one in sorted(by_source.items())},
        most_different=most_different.list_views(),
        tokenizer_trouble=trouble,
    )


def choose_row_groups(records: np.ndarray, max_records: int | None) -> np.ndarray:
    """[G] row groups evenly spread over a store: all, or as few as hold at least so many records.

    Args:
        records: [R] in each row group of the store.
        max_records: how many are enough.
    """
    if max_records is None or max_records >= records.sum():
        return np.arange(len(records))
    count = max(1, math.ceil(max_records / max(1.0, float(records.mean()))))
    return np.unique((np.arange(count) + 0.5) * len(records) // count).astype(np.int64)


@dataclass(kw_only=True)
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, values: np.ndarray) -> None:
        """Add what is known and finite."""
        known = values[np.isfinite(values)]
        self.total += float(known.sum(dtype=np.float64))
        self.count += len(known)

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass(kw_only=True)
class _Sums:
    """Sums over the positions that both stores teach."""

    taught: int = 0
    positions: int = 0
    infinite: int = 0
    agreements: int = 0
    kl: _Mean = field(default_factory=_Mean)
    reverse_kl: _Mean = field(default_factory=_Mean)
    total_variation: _Mean = field(default_factory=_Mean)
    losses: tuple[_Mean, _Mean] = field(default_factory=lambda: (_Mean(), _Mean()))
    entropies: tuple[_Mean, _Mean] = field(default_factory=lambda: (_Mean(), _Mean()))
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(_INFINITE_BIN + 1, dtype=np.int64))

    def add(self, batch: AlignedBatch, differences: SignalDifferences) -> None:
        taught = batch.loss_mask
        self.taught += int(taught.sum())
        for side, one in enumerate((batch, batch.further[0])):
            self.losses[side].add(-one.next_token_logprob[taught])
            self.entropies[side].add(one.entropy[taught])
        chosen = taught & differences.is_comparable
        kl, reverse_kl = differences.kl[chosen], differences.reverse_kl[chosen]
        self.positions += len(kl)
        self.infinite += int((~np.isfinite(kl) | ~np.isfinite(reverse_kl)).sum())
        self.agreements += int(differences.agrees[chosen].sum())
        self.kl.add(kl)
        self.reverse_kl.add(reverse_kl)
        self.total_variation.add(differences.total_variation[chosen])
        with np.errstate(divide="ignore"):
            places = np.ceil((np.log10(kl) - _FIRST_DECADE) * _BINS_PER_DECADE)
        bins = np.where(np.isinf(kl), _INFINITE_BIN, np.clip(places, 0, _INFINITE_BIN - 1))
        self.histogram += np.bincount(bins.astype(np.int64), minlength=len(self.histogram))

    def build(self, *, is_likeliest_kept: bool) -> Distances:
        return Distances(
            positions=self.positions,
            kl=self.kl.value or 0.0,
            reverse_kl=self.reverse_kl.value or 0.0,
            infinite=self.infinite,
            total_variation=self.total_variation.value or 0.0,
            agreement=self.agreements / max(1, self.positions) if is_likeliest_kept else None,
        )

    def find_quantiles(self) -> dict[str, float | None]:
        """Upper ends of the bins that the quantiles fall into; 0 for the lowest bin, None for infinite ones."""
        if not self.positions:
            return {}
        places = np.searchsorted(np.cumsum(self.histogram), np.array(_SHARES) * self.positions)
        ends = np.where(places == 0, 0.0, 10.0 ** (_FIRST_DECADE + places / _BINS_PER_DECADE))
        return {
            f"{share:g}": None if place == _INFINITE_BIN else float(end)
            for share, end, place in zip(_SHARES, ends, places, strict=True)
        }


class _MostDifferent:
    """The positions of the largest KL so far, with their texts."""

    def __init__(self, top: int, find_text: FindText) -> None:
        self._top, self._find_text = top, find_text
        self._found: list[tuple[float, int, DifferentPosition]] = []
        self._number = 0  # decides between equal ones, the earlier stays

    def add(self, batch: AlignedBatch, differences: SignalDifferences) -> None:
        if not self._top:
            return
        kl = np.where(batch.loss_mask & differences.is_comparable, differences.kl, -1.0)
        for place in np.argsort(-kl, kind="stable")[: self._top].tolist():
            least = self._found[0][0] if len(self._found) == self._top else 0.0
            if kl[place] <= least:
                break
            self._number -= 1
            entry = float(kl[place]), self._number, self._view(batch, place, float(kl[place]))
            push: Any = heapq.heappushpop if len(self._found) == self._top else heapq.heappush
            push(self._found, entry)

    def list_views(self) -> tuple[DifferentPosition, ...]:
        return tuple(view for *_, view in sorted(self._found, key=lambda entry: entry[:2], reverse=True))

    def _view(self, batch: AlignedBatch, place: int, kl: float) -> DifferentPosition:
        index = int(np.searchsorted(batch.position_offsets, place, side="right")) - 1
        record = batch.record(index)
        position = place - int(batch.position_offsets[index])
        return DifferentPosition(
            record=str(record.address),
            kl=kl if math.isfinite(kl) else None,
            context=self._find_context(record, position),
            first=view_position(record, position, self._find_text, _CANDIDATES),
            second=view_position(record.further[0], position, self._find_text, _CANDIDATES),
        )

    def _find_context(self, record: AlignedRecord, position: int) -> str | None:
        start = max(0, position + 1 - _CONTEXT_POSITIONS)
        # `cut_text` ends with the next token of the last position, so that of the one before ends with this one's.
        pieces = list(cut_text(record, range(start, max(start, position)), self._find_text))
        return "".join(piece.text for piece in pieces) if pieces else None


def _describe_store(
    store: LogitStore, manifest: int | None, left_out: int, loss: _Mean, entropy: _Mean
) -> ComparedStore:
    plan = store.plan
    unknown = plan.unknown_scalars
    return ComparedStore(
        store=store.url,
        manifest=manifest,
        teacher=plan.teacher.model,
        engine=f"{plan.teacher.engine} {plan.teacher.engine_version}",
        method=describe_method(plan.method),
        codec=plan.shard.codec.kind,
        left_out=left_out,
        teacher_loss=None if "next_token_logprob" in unknown else loss.value,
        mean_entropy=None if "entropy" in unknown else entropy.value,
    )
