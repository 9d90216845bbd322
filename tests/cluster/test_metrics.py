"""What the driver tells Prometheus: counts that add up, labels that are few, and nothing at work once it has ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from made_up_receipts import build_receipt

from cluster import metrics
from cluster.figures import CaptureFigures
from cluster.metrics import METRICS, DriverMetrics
from logitstore.store.commit import Outcome

Key = tuple[str, tuple[str, ...]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Key, float]]:
    """Values by metric and labels beside the store; of a histogram the number of observations."""
    values: dict[Key, float] = {}

    def find_key(metric: Any, tags: dict[str, str] | None) -> Key:
        labels = {**metric._default_tags, **(tags or {})}
        assert labels.pop("store") == "s3://bucket/store"
        return metric._name, tuple(labels.values())

    class Counter(metrics.Counter):
        def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
            super().inc(value, tags)
            key = find_key(self, tags)
            values[key] = values.get(key, 0) + value

    class Gauge(metrics.Gauge):
        def set(self, value: float | None, tags: dict[str, str] | None = None) -> None:
            super().set(value, tags)
            assert value is not None
            values[find_key(self, tags)] = value

    class Histogram(metrics.Histogram):
        def observe(self, value: float, tags: dict[str, str] | None = None) -> None:
            super().observe(value, tags)
            key = find_key(self, tags)
            values[key] = values.get(key, 0) + 1

    for kind in (Counter, Gauge, Histogram):
        monkeypatch.setattr(metrics, kind.__name__, kind)
    return values


def test_driver_tells_every_figure_of_a_capture_once(told: dict[Key, float]) -> None:
    figures = CaptureFigures(units_planned=10, units_before=3, quarantined=1, failures=2, actor_losses=2, actor_hangs=1)
    figures.actors_ready, figures.actors_wanted, figures.units_in_flight = 2, 4, 5
    driver = DriverMetrics("s3://bucket/store", figures)
    figures.phase = "capturing"
    figures.observe()
    for receipt in (build_receipt(empty=1), build_receipt(empty=1, not_utf8=2), build_receipt(Outcome.LOST)):
        figures.count_receipt(receipt)
        driver.count(receipt)
        driver.update()
        driver.update()
    assert told.pop(("logitstore_seconds_left", ())) >= 0
    assert told == {
        ("logitstore_unit_seconds", ()): 2,
        ("logitstore_shard_bytes", ()): 100,
        ("logitstore_documents", ()): 8,
        ("logitstore_dead_letters", ("empty",)): 2,
        ("logitstore_dead_letters", ("not_utf8",)): 2,
        ("logitstore_lost_races", ()): 1,
        ("logitstore_failures", ()): 2,
        ("logitstore_actor_losses", ()): 2,
        ("logitstore_actor_hangs", ()): 1,
        ("logitstore_units_planned", ()): 10,
        ("logitstore_units_done", ()): 6,
        ("logitstore_units_set_aside", ()): 1,
        ("logitstore_units_in_flight", ()): 5,
        ("logitstore_actors_ready", ()): 2,
        ("logitstore_actors_wanted", ()): 4,
    }


def test_driver_that_ends_leaves_nothing_at_work_and_all_that_was_done(told: dict[Key, float]) -> None:
    figures = CaptureFigures(units_planned=10, actors_ready=2, actors_wanted=4, units_in_flight=5, failures=7)
    with pytest.raises(KeyboardInterrupt), DriverMetrics("s3://bucket/store", figures):
        raise KeyboardInterrupt
    assert told[("logitstore_failures", ())] == 7
    assert told[("logitstore_units_planned", ())] == 10
    for name in ("units_in_flight", "actors_ready", "actors_wanted"):
        assert told[(f"logitstore_{name}", ())] == 0


def test_metrics_have_names_of_their_own_and_labels_of_few_values() -> None:
    exported = [name for metric in METRICS for name in metric.exported_names]
    assert len(set(exported)) == len(exported)
    assert {label for metric in METRICS for label in metric.labels} == {"store", "reason"}
