"""The stores that a run reads, opened for the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from logitstore.errors import ConfigError
from logitstore.store.logit_store import LogitStore
from logitstore.stream.cache import RowGroupCache
from logitstore.teacher.protocol import TopKMethod
from trainer.checkpoint import CheckpointHeader
from trainer.config import TrainSettings
from trainer.distributed import Processes
from trainer.loss.objective import check_loss_fits
from trainer.loss.settings import LossSettings
from trainer.stream_config import FurtherCorpusSettings, FurtherTeacherSettings


@dataclass(frozen=True, kw_only=True, eq=False)
class RunStores:
    """The stores of a run, each at one manifest.

    Attributes:
        teachers: of every teacher of the run's first corpus, the run's own store first.
        corpora: of every further corpus, in the settings' order.
    """

    teachers: tuple[LogitStore, ...]
    corpora: tuple[LogitStore, ...] = ()

    @property
    def every(self) -> tuple[LogitStore, ...]:
        """Of teachers and corpora."""
        return (*self.teachers, *self.corpora)


def open_pinned_stores(settings: TrainSettings, header: CheckpointHeader | None, processes: Processes) -> RunStores:
    """Open every store of a run at one manifest for the whole run, all behind the run's cache.

    That is the checkpoint's, else the one that rank 0 finds: a store may grow while a run goes on, and "latest" is
    not the same for two ranks that ask at different moments.
    """
    of_teachers = [] if header is None else [header.manifest_number, *header.further_manifests]
    cache = None if settings.cache is None else settings.cache.build()

    def open_pinned(
        asked: TrainSettings | FurtherTeacherSettings | FurtherCorpusSettings, pinned: int | None
    ) -> LogitStore:
        options = settings.storage_options if asked.storage_options is None else asked.storage_options
        manifest = pinned if asked.manifest == "latest" and pinned is not None else asked.manifest
        return open_at_one_manifest(asked.store, manifest, options, processes, cache=cache)

    asked: list[TrainSettings | FurtherTeacherSettings] = [settings, *settings.further_teachers]
    teachers = tuple(
        open_pinned(teacher, of_teachers[number] if number < len(of_teachers) else None)
        for number, teacher in enumerate(asked)
    )
    # A store that is asked for more than once is at one manifest.
    by_url = {settings.store: teachers[0].manifest_number, **({} if header is None else header.corpus_manifests)}
    corpora = []
    for corpus in settings.further_corpora:
        corpora.append(open_pinned(corpus, by_url.get(corpus.store)))
        by_url.setdefault(corpus.store, corpora[-1].manifest_number)
    return RunStores(teachers=teachers, corpora=tuple(corpora))


def open_at_one_manifest(
    url: str,
    manifest: int | Literal["latest"],
    storage_options: dict[str, Any],
    processes: Processes,
    *,
    cache: RowGroupCache | None = None,
) -> LogitStore:
    """Open a store on every rank at the manifest that rank 0 finds; every rank has to come here."""
    with processes.fail_together(url):
        store = LogitStore.open(url, manifest, storage_options, cache=cache)
    assert store.manifest_number is not None  # only a live snapshot has none
    shared_number = processes.take_from_first(store.manifest_number)
    with processes.fail_together(url):
        if shared_number != store.manifest_number:
            store = LogitStore.open(url, shared_number, storage_options, cache=cache)
    return store


def list_manifests(stores: Sequence[LogitStore]) -> list[int]:
    """Numbers of the manifests that stored ones were opened at."""
    return [store.manifest_number for store in stores if store.manifest_number is not None]


def check_loss_fits_stores(loss: LossSettings, stores: Sequence[LogitStore]) -> None:
    """Check that a loss can be had from the signals of every store.

    Raises:
        ConfigError: names the store, where there are several, and what does not go together.
    """
    kept, drawn = ([store.url for store in stores if store.plan.is_drawn is is_drawn] for is_drawn in (False, True))
    if kept and drawn and loss.kind != "cross_entropy":
        raise ConfigError(
            "further_teachers, further_corpora: expected stores that one loss suits, found both kinds\n"
            f"  of the likeliest ids: {', '.join(kept)}\n  of drawn supports: {', '.join(drawn)}\n"
            "teach from stores of one kind"
        )
    for store in stores:
        try:
            check_loss_fits(
                loss,
                is_support_drawn=store.plan.is_drawn,
                is_entropy_known="entropy" not in store.plan.unknown_scalars,
                temperatures=store.plan.temperatures,
            )
        except ConfigError as error:
            raise error if len(stores) == 1 else ConfigError(f"{store.url}: {error}") from None


def check_slots_fit_stores(stores: Sequence[LogitStore], slots: int) -> None:
    """Check that supports can be cut to their first slots.

    Raises:
        ConfigError: names the store whose supports are drawn, or none of them keeps so many.
    """
    for store in stores:
        if store.plan.is_drawn:
            raise ConfigError(
                "support_slots: expected a store that keeps the likeliest ids, found one of drawn supports, "
                f"{store.url}: the weights of a part of the draws do not estimate the teacher's distribution; leave it "
                "out, or capture with fewer draws"
            )
    kept = [store.plan.method.k for store in stores if isinstance(store.plan.method, TopKMethod)]
    if len(kept) == len(stores) and slots > max(kept):  # a run of all of them would bear the name of more
        raise ConfigError(
            f"support_slots: expected at most the {max(kept)} slots of a position that "
            f"{' and '.join(store.url for store in stores)} keep(s), found {slots}; leave it out to teach all of them"
        )
