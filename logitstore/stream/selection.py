"""Which row groups a training run reads, and which it keeps for evaluation."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
from pydantic import model_validator

from logitstore.errors import ConfigError
from logitstore.settings import Settings
from logitstore.store.logit_store import LogitStore


class HeldOut(Settings):
    """Records kept from training, by corpus source or as a part of the row groups; exactly one of the two.

    `fraction` takes whole row groups, chosen by their digest: the same ones for every student of a store.
    """

    source: str | None = None
    fraction: float | None = None

    @model_validator(mode="after")
    def _check(self) -> HeldOut:
        if (self.source is None) == (self.fraction is None):
            raise ValueError("expected exactly one of source and fraction")
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise ValueError(f"expected a fraction between 0 and 1, found {self.fraction}")
        return self


def split_row_groups(store: LogitStore, held_out: HeldOut | None) -> tuple[np.ndarray, np.ndarray]:
    """Row groups for training and for evaluation, each [·] int64, ascending.

    Raises:
        ConfigError: the store has no such source, or one of the two parts would be empty.
    """
    everything = np.arange(store.num_row_groups)
    if held_out is None:
        return everything, everything[:0]
    rows = store.manifest.row_groups
    if held_out.source is not None:
        is_held = pc.equal(rows["source"], held_out.source).to_numpy()
    else:
        assert held_out.fraction is not None
        # The first 52 bits of the digest, as an integer.
        keys = store.manifest.digests[:, :7].astype(np.int64) @ (1 << np.arange(48, -1, -8)) >> 4
        ranks = np.argsort(np.argsort(keys, kind="stable"), kind="stable")
        is_held = ranks < max(1, round(held_out.fraction * len(keys)))
    train, kept = everything[~is_held], everything[is_held]
    if not len(train) or not len(kept):
        raise ConfigError(
            f"held_out: {held_out.model_dump(exclude_none=True)} leaves {len(train)} row groups of {store.url} to "
            f"train on and {len(kept)} to evaluate; its sources are {store.list_sources()}"
        )
    return train, kept
