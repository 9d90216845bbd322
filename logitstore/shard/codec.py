"""Value codecs: how logprobs and the scalars per position are rounded for storage.

Both codecs of format version 1 store plain float32 columns, so any reader sees nats. A codec is chosen per store,
declared in the plan and in every shard, and its bound is checked for every row group that is written.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from logitstore.errors import InvalidSignalError
from logitstore.settings import Settings


class Float32Codec(Settings):
    """Values as the teacher computed them, bit for bit."""

    kind: Literal["float32"] = "float32"

    @property
    def relative_bound(self) -> float:
        """Largest |decoded - value| / |value|."""
        return 0.0

    @property
    def absolute_bound(self) -> float:
        """Largest |decoded - value| where the relative bound is smaller, in nats."""
        return 0.0

    def round(self, values: np.ndarray) -> np.ndarray:
        return values.astype(np.float32, copy=False)


class Float16Codec(Settings):
    """Values rounded to float16 and kept in float32 columns.

    The thirteen mantissa bits that are zero compress away; a float16 column would be 5% smaller, but several Parquet
    readers cannot compute on one.
    """

    kind: Literal["float16"] = "float16"

    @property
    def relative_bound(self) -> float:
        return 2.0**-11

    @property
    def absolute_bound(self) -> float:
        return 2.0**-25  # half the spacing of float16's subnormal numbers

    def round(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)


Codec = Annotated[Float32Codec | Float16Codec, Field(discriminator="kind")]


def encode_values(codec: Codec, values: np.ndarray, *, where: str) -> np.ndarray:
    """Round values for storage, float32 out.

    Raises:
        InvalidSignalError: a rounded value misses the codec's bound (a finite value beyond float16's range does).
    """
    rounded: np.ndarray = codec.round(values)
    with np.errstate(invalid="ignore"):
        error = np.abs(rounded.astype(np.float64) - values.astype(np.float64))
        allowed = np.maximum(codec.relative_bound * np.abs(values.astype(np.float64)), codec.absolute_bound)
    # -inf - -inf is NaN and means no error; a NaN value is caught by the invariants.
    missed = (error > allowed) | (np.isinf(rounded) & np.isfinite(values))
    if missed.any():
        worst = int(np.argmax(missed))
        raise InvalidSignalError(
            f"{where}: expected {codec.kind} to hold values within its bound, found {values[worst]!r} stored as "
            f"{rounded[worst]!r}; capture with codec float32"
        )
    return rounded
