"""Which units an engine has died under, and which of their documents it dies of.

An engine that runs out of memory in its own process, or crashes there, takes everything with it that it had been given:
which document it was nobody can say. So a unit that an engine has died under is captured with care from then on, one
document at a time, which also is the smallest batch there is. The document that an engine dies of then is under
suspicion; the one that the next engine dies of as well is left out, and its unit survives it. Two, because engines may
also be killed by somebody else.

Nothing of this is written down: a driver that is run again begins without suspicion.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from logitstore.capture import MOST_UNUSABLE_DOCUMENTS
from logitstore.errors import TeacherLostError
from logitstore.unit_records import LeftOut, UnitCare

_LONGEST_DETAIL = 160


@dataclass(kw_only=True)
class _Suspicion:
    suspects: set[str] = field(default_factory=set)
    left_out: dict[str, LeftOut] = field(default_factory=dict)


class Suspicions:
    """What a driver remembers about engines that have died."""

    def __init__(self) -> None:
        self._units: dict[int, _Suspicion] = {}

    def find_care(self, unit: int) -> UnitCare | None:
        """How a unit is to be captured; None for the usual way."""
        suspicion = self._units.get(unit)
        return None if suspicion is None else UnitCare(left_out=dict(suspicion.left_out))

    def note_death(self, unit: int, error: TeacherLostError) -> bool:
        """An engine has died under a unit; returns whether a document is left out from now on that was not before."""
        suspicion = self._units.setdefault(unit, _Suspicion())
        document_id = error.document_id
        if document_id is None or document_id in suspicion.left_out:
            return False
        if document_id not in suspicion.suspects:
            suspicion.suspects.add(document_id)
            return False
        if len(suspicion.left_out) >= MOST_UNUSABLE_DOCUMENTS:
            return False
        detail = f"expected the teacher's engine to live, found that it died twice: {error}"[:_LONGEST_DETAIL]
        suspicion.left_out[document_id] = LeftOut(reason="engine_died", detail=detail)
        return True

    def forget(self, unit: int) -> None:
        """The unit is committed, or set aside."""
        self._units.pop(unit, None)
