"""What a layout is: the columns of a data set, and the conversion between them and sequences with their signals."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, Protocol, TypeAlias

import pyarrow as pa

from logitstore.interchange.rows import ForeignRow
from logitstore.records import RecordBatch

Alignment: TypeAlias = Literal["next", "same"]


class LayoutName(StrEnum):
    """The layouts there are."""

    DISTILLKIT = "distillkit"
    DISTILLKIT_COMPRESSED = "distillkit-compressed"
    AXOLOTL = "axolotl"


class Layout(Protocol):
    """One layout with its settings.

    Attributes:
        columns: that a data set must have.
        optional_columns: that are read where they are there.
        top_k: entries of a position.
    """

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def optional_columns(self) -> tuple[str, ...]: ...

    @property
    def top_k(self) -> int: ...

    @property
    def relative_bound(self) -> float | None:
        """Largest |written - value| / |value| of a logprob; None where the layout has no bound."""
        ...

    @property
    def is_renormalized(self) -> bool:
        """Whether it writes logprobs that are normalized over the entries it keeps, not over the vocabulary."""
        ...

    def build_table(self, batch: RecordBatch) -> pa.Table:
        """Rows of the data set, one per record.

        Raises:
            ConfigError: the layout cannot hold a record.
        """
        ...

    def read_row(self, table: pa.Table, row: int) -> ForeignRow:
        """One row of a table that has the columns.

        Raises:
            RejectedRowError: it cannot be used.
        """
        ...
