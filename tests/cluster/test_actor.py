"""The figures that a capture actor counts, without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster import actor as actor_module
from cluster.settings import ClusterCaptureSettings
from logitstore.capture import Receipt
from logitstore.settings import build_settings
from logitstore.store.commit import Outcome


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What was added to each metric; adding nothing is an error, as it is in Ray."""
    totals: dict[str, float] = {}

    def build_counter(name: str, *_: object, **__: object) -> SimpleNamespace:
        def increase(value: float, tags: dict[str, str]) -> None:
            assert value > 0
            assert tags == {"store": "memory://store"}
            totals[name] = totals.get(name, 0) + value

        return SimpleNamespace(inc=increase)

    monkeypatch.setattr(actor_module, "Counter", build_counter)
    return totals


@pytest.mark.parametrize(
    ("outcome", "positions", "dead_letters", "expected"),
    [
        (Outcome.WON, 40, 0, {"logitstore_positions": 40, "logitstore_units": 1}),
        (Outcome.WON, 0, 2, {"logitstore_units": 1, "logitstore_dead_letters": 2}),
        (Outcome.LOST, 40, 2, {}),
    ],
)
def test_actor_counts_what_it_committed_and_nothing_else(
    counted: dict[str, float], outcome: Outcome, positions: int, dead_letters: int, expected: dict[str, float]
) -> None:
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
        dead_letters=dead_letters,
        seconds=0.1,
    )
    actor._capture = SimpleNamespace(capture=lambda unit, attempt: receipt)
    assert actor.capture(0, "attempt") == receipt
    assert counted == expected
