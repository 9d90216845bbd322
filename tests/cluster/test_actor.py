"""What a capture actor counts, without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster import actor as actor_module
from cluster import metrics
from cluster.settings import ClusterCaptureSettings
from logitstore.capture import Receipt
from logitstore.settings import build_settings
from logitstore.store.commit import Outcome


@pytest.mark.parametrize(
    ("outcome", "positions", "expected"),
    [
        (Outcome.WON, 40, {"logitstore_positions": 40, "logitstore_units": 1}),
        (Outcome.WON, 0, {"logitstore_units": 1}),
        (Outcome.LOST, 40, {}),
    ],
)
def test_actor_counts_what_it_committed_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, outcome: Outcome, positions: int, expected: dict[str, float]
) -> None:
    totals: dict[str, float] = {}

    class CountingCounter(metrics.Counter):
        def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
            assert self._get_final_tags(tags) == {"store": "memory://store"}
            super().inc(value, tags)
            totals[self._name] = totals.get(self._name, 0) + value

    monkeypatch.setattr(metrics, "Counter", CountingCounter)
    values = {"store": "memory://store", "corpus": {"files": ["a.txt"]}, "teacher": {"model": "made-up"}}
    actor_class: Any = actor_module.CaptureActor
    actor = actor_class.__ray_metadata__.modified_class(build_settings(ClusterCaptureSettings, values, where="test"))
    receipt = Receipt(
        unit=0,
        outcome=outcome,
        records=positions,
        positions=positions,
        bytes=1,
        documents=2,
        dead_letters=0,
        seconds=0.1,
    )
    actor._capture = SimpleNamespace(capture=lambda unit, attempt, care: receipt)
    assert actor.capture(0, "attempt") == receipt
    assert totals == expected
