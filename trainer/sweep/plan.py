"""Which runs of a sweep share a stream: those that read the same records in the same order."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

from trainer.config import TrainSettings
from trainer.sweep.settings import SweepRun

# Settings that decide what is read, in which order, and how.
_OF_READING = (
    "store",
    "manifest",
    "where",
    "held_out",
    "global_batch_sequences",
    "further_corpora",
    "skip_steps",
    "cache",
    "scratch",
    "stream",
    "device",
)
# Settings that have no part in how records become micro-batches: all others, also those that are still to be invented,
# keep two runs from being given the same ones.
_NOT_OF_COLLATION = frozenset(
    {
        "student",
        "loss",
        "optimizer",
        "schedule",
        "steps",
        "precision",
        "fused_loss",
        "parallel",
        "activation_checkpointing",
        "max_skipped_steps",
        "seed",
        "order_seed",
        "evaluate_every",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "log_records",
        "output",
    }
)


def group_runs(runs: Iterable[SweepRun], runs_at_once: int | None = None) -> list[list[SweepRun]]:
    """Runs by the stream that they share, in the order of their first runs.

    Args:
        runs: of a sweep.
        runs_at_once: how many a group may have; None is any number.
    """
    groups: dict[str, list[SweepRun]] = {}
    for run in runs:
        groups.setdefault(describe_reading(run.settings), []).append(run)
    if runs_at_once is None:
        return list(groups.values())
    return [part for group in groups.values() for part in split(group, runs_at_once)]


def plan_groups(
    runs: Sequence[SweepRun], runs_at_once: int | None = None, *, workers: int | None = None
) -> list[list[SweepRun]]:
    """Runs by the stream that they share, in as many groups as there are workers if there are enough runs.

    Args:
        runs: of a sweep.
        runs_at_once: how many a group may have; None is any number.
        workers: that train groups side by side; None leaves these as they are.
    """
    groups = group_runs(runs, runs_at_once)
    parts = [1] * len(groups)
    while sum(parts) < min(workers or 0, len(runs)):
        largest = max(range(len(groups)), key=lambda number: len(groups[number]) / parts[number])
        parts[largest] += 1
    return [part for group, count in zip(groups, parts, strict=True) for part in divide(group, count)]


def divide(runs: Sequence[SweepRun], count: int) -> list[list[SweepRun]]:
    """Runs in so many parts, none of which has two more than another."""
    bounds = [len(runs) * number // count for number in range(count + 1)]
    return [list(runs[start:stop]) for start, stop in itertools.pairwise(bounds)]


def split(runs: Sequence[SweepRun], size: int) -> list[list[SweepRun]]:
    """Runs in parts of a size, the last of which may have fewer."""
    return [list(runs[start : start + size]) for start in range(0, len(runs), size)]


def describe_reading(settings: TrainSettings) -> str:
    """The same text for two runs whose records may come from one stream."""
    values: dict[str, Any] = settings.model_dump(mode="json", include=set(_OF_READING))
    values["order_seed"] = settings.seed if settings.order_seed is None else settings.order_seed
    # What a teacher counts is no matter of reading; what a corpus counts is.
    values["further_teachers"] = [(teacher.store, teacher.manifest) for teacher in settings.further_teachers]
    # Kept in memory, and never printed.
    further = [one.storage_options for one in settings.further_teachers]
    further += [one.storage_options for one in settings.further_corpora]
    return json.dumps([values, settings.storage_options, further], sort_keys=True, default=repr)


def describe_collation(settings: TrainSettings) -> str:
    """The same text for two runs of one stream whose records become the same micro-batches."""
    # A student with another tokenizer has micro-batches of its own tokens, in rows as long as it reads.
    kept = set() if settings.other_tokenizer is None else {"student"}
    return settings.model_dump_json(exclude=set(_NOT_OF_COLLATION) - kept)
