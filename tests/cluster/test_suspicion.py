"""Which documents a driver leaves out because engines die of them."""

from __future__ import annotations

from cluster.suspicion import Suspicions
from logitstore.errors import TeacherLostError
from logitstore.unit_records import UnitCare


def die_of(document_id: str | None) -> TeacherLostError:
    error = TeacherLostError("engine: expected an answer, found it dead")
    error.document_id = document_id
    return error


def test_unit_without_a_death_gets_no_care() -> None:
    assert Suspicions().find_care(3) is None


def test_document_that_two_engines_die_of_is_left_out_and_no_other() -> None:
    suspicions = Suspicions()
    assert not suspicions.note_death(3, die_of(None))
    assert suspicions.find_care(3) == UnitCare()
    assert not suspicions.note_death(3, die_of("a"))
    assert not suspicions.note_death(3, die_of("b"))
    assert suspicions.find_care(3) == UnitCare()
    assert suspicions.note_death(3, die_of("a"))
    assert not suspicions.note_death(3, die_of("a"))  # it cannot be: it was left out
    care = suspicions.find_care(3)
    assert care is not None
    assert [(name, why.reason) for name, why in care.left_out.items()] == [("a", "engine_died")]
    assert "died twice: engine: expected an answer" in care.left_out["a"].detail
    assert suspicions.find_care(4) is None
    suspicions.forget(3)
    assert suspicions.find_care(3) is None


def test_no_more_documents_of_a_unit_are_left_out_than_a_capture_does_without() -> None:
    suspicions = Suspicions()
    found = []
    for document in range(10):
        suspicions.note_death(0, die_of(str(document)))
        found.append(suspicions.note_death(0, die_of(str(document))))
    assert found == [True] * 8 + [False] * 2
