"""What docs/faults.md says of reasons and numbers is what the code does."""

from __future__ import annotations

import re
from typing import get_args

from checkout import ROOT

from cluster import load_ends
from cluster.settings import ActorSettings
from cluster.unit_patience import FIRST_SECONDS, LEAST_SECONDS, TIMES_THE_SLOWEST
from cluster.unit_queue import QueueLimits
from logitstore.capture import MOST_UNUSABLE_DOCUMENTS
from logitstore.corpus.documents import DeadLetterReason

PAGE = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")


def list_reasons(kind: object) -> set[str]:
    """Of a Literal with Literals in it."""
    return {name for part in get_args(kind) for name in ([part] if isinstance(part, str) else list_reasons(part))}


def test_page_names_dead_letters_that_there_are() -> None:
    named = set(re.findall(r"dead letter: `(\w+)`", PAGE))
    assert named == {"out_of_memory", "invalid_signal", "engine_died"}
    assert named <= list_reasons(DeadLetterReason)


def test_page_tells_the_limits_that_there_are() -> None:
    limits = QueueLimits()
    words = {120.0: "two minutes", 8: "more than eight", 3: "fails three times", 6: "six actors"}
    for value in (limits.patience_seconds, MOST_UNUSABLE_DOCUMENTS, ActorSettings().tries, limits.losses):
        assert words[value] in PAGE


def test_page_tells_how_long_actors_are_waited_for() -> None:
    words = {600.0: "ten minutes", 21600.0: "six hours", 10.0: "ten times", 60.0: "up to a minute"}
    waits = (LEAST_SECONDS, FIRST_SECONDS, TIMES_THE_SLOWEST, load_ends.PATIENCE_SECONDS)
    for value in (*waits, load_ends.LONGEST_REST_SECONDS, ActorSettings().load_seconds):
        assert words[value or 0.0] in PAGE
