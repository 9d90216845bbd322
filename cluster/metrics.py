"""Figures of a capture for Prometheus, through Ray: what there is, and who counts it.

Ray serves them on the metrics port of every machine, `ray_` before their names and `_total` behind those of counters,
with labels of its own for machine and process. Ours are few and bounded: the store, and why a document is dead. What
the driver can count is counted there, once, and not by thousands of actors.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

from ray.util.metrics import Counter, Gauge, Histogram

from cluster.figures import CaptureFigures
from logitstore.capture import Receipt
from logitstore.store.commit import Outcome

# Units are made to take from seconds, of small models on CPUs, to an hour.
UNIT_SECONDS = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 3600.0)


@dataclass(frozen=True, kw_only=True)
class CaptureMetric:
    """One figure; `name` is that in Ray."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...] = ("store",)
    description: str

    @property
    def exported_names(self) -> tuple[str, ...]:
        """The names that Prometheus sees."""
        if self.kind == "counter":
            return (f"ray_{self.name}_total",)
        if self.kind == "histogram":
            return tuple(f"ray_{self.name}_{part}" for part in ("bucket", "count", "sum"))
        return (f"ray_{self.name}",)


def _counter(name: str, description: str, *labels: str) -> CaptureMetric:
    return CaptureMetric(name=name, kind="counter", labels=("store", *labels), description=description)


def _gauge(name: str, description: str) -> CaptureMetric:
    return CaptureMetric(name=name, kind="gauge", description=description)


UNITS = _counter("logitstore_units", "Units committed, by the actors")
POSITIONS = _counter("logitstore_positions", "Positions committed, by the actors")
UNIT_TIMES = CaptureMetric(
    name="logitstore_unit_seconds", kind="histogram", description="Seconds that a unit took its actor, until its commit"
)
SHARD_BYTES = _counter("logitstore_shard_bytes", "Bytes of committed shards")
DOCUMENTS = _counter("logitstore_documents", "Documents of committed units, dead letters included")
DEAD_LETTERS = _counter("logitstore_dead_letters", "Documents that could not be used, by reason", "reason")
LOST_RACES = _counter("logitstore_lost_races", "Units found committed, by another capture or a lost actor")
FAILURES = _counter("logitstore_failures", "Attempts at a unit that failed")
ACTOR_LOSSES = _counter("logitstore_actor_losses", "Actors that were lost, with or without their machines")
ACTOR_HANGS = _counter("logitstore_actor_hangs", "Of those, actors given up because a unit took them too long")
UNITS_PLANNED = _gauge("logitstore_units_planned", "Units of the store's plan")
UNITS_DONE = _gauge("logitstore_units_done", "Units of the plan that are committed, in earlier runs too")
UNITS_SET_ASIDE = _gauge("logitstore_units_set_aside", "Units that failed too often to be tried again")
UNITS_IN_FLIGHT = _gauge("logitstore_units_in_flight", "Units that are with an actor")
ACTORS_READY = _gauge("logitstore_actors_ready", "Actors that have loaded the teacher")
ACTORS_WANTED = _gauge("logitstore_actors_wanted", "Actors that there are to be")
SECONDS_LEFT = _gauge("logitstore_seconds_left", "Until the end of the capture, at its pace of late")

METRICS = (
    UNITS, POSITIONS, UNIT_TIMES, SHARD_BYTES, DOCUMENTS, DEAD_LETTERS, LOST_RACES, FAILURES, ACTOR_LOSSES, ACTOR_HANGS,
    UNITS_PLANNED, UNITS_DONE, UNITS_SET_ASIDE, UNITS_IN_FLIGHT, ACTORS_READY, ACTORS_WANTED, SECONDS_LEFT,
)  # fmt: skip


class ActorMetrics:
    """What an actor counts: its pace, which Ray's labels tell apart by machine."""

    def __init__(self, store: str) -> None:
        self._units = _build_counter(UNITS, store)
        self._positions = _build_counter(POSITIONS, store)

    def count(self, receipt: Receipt) -> None:
        """Add a unit, if it is this actor's that was committed."""
        if receipt.outcome is Outcome.WON:
            _add(self._units, 1)
            _add(self._positions, receipt.positions)


class DriverMetrics:
    """What the driver knows: use as a context manager, so that nothing seems to be at work when it has ended."""

    def __init__(self, store: str, figures: CaptureFigures) -> None:
        self._store, self._figures = store, figures
        self._unit_times = Histogram(
            UNIT_TIMES.name, UNIT_TIMES.description, boundaries=list(UNIT_SECONDS), tag_keys=UNIT_TIMES.labels
        )
        self._dead_letters = _build_counter(DEAD_LETTERS, store)
        counted: dict[CaptureMetric, Callable[[], int]] = {
            SHARD_BYTES: lambda: figures.bytes,
            DOCUMENTS: lambda: figures.documents,
            LOST_RACES: lambda: figures.lost_races,
            FAILURES: lambda: figures.failures,
            ACTOR_LOSSES: lambda: figures.actor_losses,
            ACTOR_HANGS: lambda: figures.actor_hangs,
        }
        self._counters = {metric: (_build_counter(metric, store), read) for metric, read in counted.items()}
        self._counted = dict.fromkeys(counted, 0)
        self._counted_letters: Counts[str] = Counts()
        gauges = [metric for metric in METRICS if metric.kind == "gauge"]
        self._gauges = {metric: Gauge(metric.name, metric.description, metric.labels) for metric in gauges}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.update()
        for metric in (UNITS_IN_FLIGHT, ACTORS_READY, ACTORS_WANTED):
            self._set(metric, 0)

    def count(self, receipt: Receipt) -> None:
        """Take note of how long a unit took."""
        if receipt.outcome is Outcome.WON:
            self._unit_times.observe(receipt.seconds, {"store": self._store})

    def update(self) -> None:
        """Bring all figures up to date."""
        figures = self._figures
        for metric, (counter, read) in self._counters.items():
            value = read()
            _add(counter, value - self._counted[metric])
            self._counted[metric] = value
        for reason, count in figures.dead_letter_counts.items():
            _add(self._dead_letters, count - self._counted_letters[reason], reason=reason)
            self._counted_letters[reason] = count
        self._set(UNITS_PLANNED, figures.units_planned)
        self._set(UNITS_DONE, figures.units_done - figures.quarantined)
        self._set(UNITS_SET_ASIDE, figures.quarantined)
        self._set(UNITS_IN_FLIGHT, figures.units_in_flight)
        self._set(ACTORS_READY, figures.actors_ready)
        self._set(ACTORS_WANTED, figures.actors_wanted)
        self._set(SECONDS_LEFT, figures.seconds_left)

    def _set(self, metric: CaptureMetric, value: float | None) -> None:
        """Show a value; what is not known stays as it was."""
        if value is not None:
            self._gauges[metric].set(value, {"store": self._store})


def _build_counter(metric: CaptureMetric, store: str) -> Counter:
    counter = Counter(metric.name, metric.description, metric.labels)
    counter.set_default_tags({"store": store})
    return counter


def _add(counter: Counter, count: int, **labels: str) -> None:
    """Increase a counter; by nothing is an error in Ray."""
    if count > 0:
        counter.inc(count, labels)
