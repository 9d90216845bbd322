"""Every error the project raises on purpose, with the exit code its command ends with.

Messages read *where: what was expected, what was found; what to do.* Each class is also the builtin error that a
reader would guess, so `except ValueError` around a settings file works as expected.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal


class LogitStoreError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns for it."""

    exit_code: ClassVar[int] = 1

    def __reduce__(self) -> tuple[Any, ...]:
        # Python would call the class with the message alone, whatever else it is built from.
        return _rebuild, (type(self), *self.args), vars(self)


def _rebuild(kind: type[LogitStoreError], *args: object) -> LogitStoreError:
    return kind.__new__(kind, *args)


class ConfigError(LogitStoreError, ValueError):
    """A setting, an argument or a settings file is wrong."""

    exit_code = 2


class CorpusError(LogitStoreError, ValueError):
    """A corpus file is damaged or gone: the units that need it cannot be captured, others can."""

    exit_code = 2


class ShapeError(LogitStoreError, ValueError):
    """Arrays or tensors do not fit together."""


class StoreNotFoundError(LogitStoreError, FileNotFoundError):
    """There is no store, no manifest or no such record at the address given."""

    exit_code = 2


class IncompatibleStoreError(LogitStoreError, ValueError):
    """Store and caller disagree: format version, plan, teacher, tokenizer or vocabulary."""

    exit_code = 3


class CorruptShardError(LogitStoreError, OSError):
    """Bytes of a store are not the bytes that were committed."""

    exit_code = 3


class InvalidSignalError(LogitStoreError, ValueError):
    """A signal breaks an invariant of the format (not finite, mass above 1, shifted, repeated ids)."""

    exit_code = 3


class TeacherError(LogitStoreError, RuntimeError):
    """The teacher cannot be loaded, or returned something that cannot be stored."""

    exit_code = 3


class UnusableSequenceError(TeacherError):
    """The teacher cannot score, or answer, one of the sequences that it was given.

    Attributes:
        reason: of the dead letter that a document of the sequence becomes.
        sequence: 0-based, among those that the teacher was given.
        position: 0-based, in the sequence; where the trouble was found.
        detail: what the dead letter says.
    """

    reason: ClassVar[Literal["invalid_signal", "out_of_memory"]]
    sequence: int
    position: int

    @property
    def detail(self) -> str:
        raise NotImplementedError


class InvalidLogitsOfSequenceError(UnusableSequenceError):
    """The teacher's logits at a position of a sequence are NaN, infinite, or none at all.

    Attributes:
        found: what was there instead of finite logits.
    """

    reason = "invalid_signal"

    def __init__(self, teacher: str, sequence: int, position: int, found: str) -> None:
        super().__init__(
            f"teacher {teacher!r}: sequence {sequence}, position {position}: expected finite logits, found {found}; "
            "try another dtype or check the weights"
        )
        self.sequence, self.position, self.found = sequence, position, found

    @property
    def detail(self) -> str:
        return f"expected finite logits of the teacher, found {self.found}"


class OutOfMemoryOfSequenceError(UnusableSequenceError):
    """There is not enough memory for a sequence although the teacher was given no other beside it.

    Attributes:
        num_tokens: of the sequence.
        found: what the allocator said.
    """

    reason = "out_of_memory"

    def __init__(self, teacher: str, sequence: int, num_tokens: int, found: str) -> None:
        super().__init__(
            f"teacher {teacher!r}: sequence {sequence}: expected memory for its {num_tokens} tokens alone, found "
            f"{found}; set sequences.length or teacher.head_chunk_positions to less, or free memory"
        )
        self.sequence, self.position, self.num_tokens, self.found = sequence, 0, num_tokens, found

    @property
    def detail(self) -> str:
        return f"expected memory for {self.num_tokens} tokens, found {self.found}"


class UnusableDocumentError(TeacherError):
    """A document that the teacher cannot score or answer, and what it says about it."""

    def __init__(self, document_id: str, error: UnusableSequenceError) -> None:
        super().__init__(f"document {document_id!r}: {error}")
        self.document_id = document_id
        self.reason = error.reason
        self.detail = error.detail


class TeacherLostError(TeacherError):
    """The engine that runs the teacher has died: nothing more can be scored in this process, a new one may.

    Attributes:
        document_id: the document that the engine was alone with, None where there were several or none.
    """

    exit_code = 4
    document_id: str | None = None


class CaptureError(LogitStoreError, RuntimeError):
    """A capture ended with quarantined units."""

    exit_code = 3


class TrainingError(LogitStoreError, RuntimeError):
    """Training cannot go on: checkpoint of another run, non-finite loss, ranks that disagree."""

    exit_code = 3


class OutsideError(LogitStoreError, OSError):
    """Storage, network or cluster trouble that may pass: worth running the command again."""

    exit_code = 4
