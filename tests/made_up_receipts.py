"""Made-up receipts: what an actor says of a unit that it has captured."""

from __future__ import annotations

from logitstore.capture import Receipt
from logitstore.store.commit import Outcome


def build_receipt(outcome: Outcome = Outcome.WON, **counts: int) -> Receipt:
    """Of a unit; `counts` are of dead letters by reason."""
    return Receipt(
        unit=0,
        outcome=outcome,
        records=1,
        positions=100,
        bytes=50,
        documents=4,
        dead_letters=sum(counts.values()),
        dead_letter_counts=counts,
        seconds=2.0,
    )
