"""Several processes evaluate on the same manifest, whatever each of them finds to be the newest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from judged_stores import build_labelled_store

from logitstore.settings import build_settings
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import write_manifest
from trainer.config import EvaluateSettings
from trainer.distributed import Processes
from trainer.evaluate import pin_manifest
from trainer.stores import open_at_one_manifest


@dataclass(frozen=True, kw_only=True)
class SecondRank(Processes):
    """One of several ranks, without their process group; the first of them looked when there was one manifest."""

    def take_from_first(self, number: int) -> int:
        assert number == 2
        return 1


@pytest.fixture
def grown(tmp_path: Path) -> LogitStore:
    store = build_labelled_store(tmp_path)
    write_manifest(StoreFiles(store.url), store.plan.compute_fingerprint(), without=[3])
    return LogitStore.open(store.url)


def test_rank_that_finds_a_newer_manifest_takes_that_of_rank_0(grown: LogitStore) -> None:
    assert grown.manifest_number == 2
    second = SecondRank(rank=1, world_size=1, device=torch.device("cpu"))
    opened = open_at_one_manifest(grown.url, "latest", {}, second)
    assert (opened.manifest_number, len(opened)) == (1, 64)
    settings = build_settings(EvaluateSettings, {"store": grown.url, "student": "s"}, where="test")
    assert settings.manifest == "latest"
    assert pin_manifest(settings, second).manifest == 1
    alone = Processes(rank=0, world_size=1, device=torch.device("cpu"))
    assert pin_manifest(settings, alone).manifest == 2
