"""Floating-point numbers of the precisions that data sets hold, bfloat16 among them, as bytes and as NumPy arrays.

NumPy knows no bfloat16: such values live in float32 arrays whose lower sixteen bits are zero.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np

FloatName: TypeAlias = Literal["float16", "bfloat16", "float32", "float64"]

ITEM_BYTES: dict[FloatName, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
# Half the spacing of numbers next to 1: the largest relative error of rounding to the nearest.
RELATIVE_BOUND: dict[FloatName, float] = {
    "float16": 2.0**-11,
    "bfloat16": 2.0**-9,
    "float32": 2.0**-24,
    "float64": 2.0**-53,
}
_IN_MEMORY: dict[FloatName, np.dtype[np.floating]] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<f4"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
}


def round_to(values: np.ndarray, name: FloatName) -> np.ndarray:
    """Values rounded to the nearest of a precision, ties to even; float32, or float64 where that is the precision."""
    if name == "bfloat16":
        return (_round_to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        rounded = values.astype(_IN_MEMORY[name])
    return rounded if name == "float64" else rounded.astype(np.float32)


def to_bytes(values: np.ndarray, name: FloatName) -> np.ndarray:
    """[R, N] values as [R, N · item bytes] uint8, little-endian."""
    if name == "bfloat16":
        stored = _round_to_bfloat16(values).astype("<u2")
    else:
        with np.errstate(over="ignore"):
            stored = values.astype(_IN_MEMORY[name])
    return np.ascontiguousarray(stored).view(np.uint8).reshape(len(values), -1)


def from_bytes(data: np.ndarray, name: FloatName) -> np.ndarray:
    """Undo `to_bytes`; float32, or float64 where that is the precision."""
    data = np.ascontiguousarray(data)
    if name == "bfloat16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    values = data.view(_IN_MEMORY[name])
    return values if name == "float64" else values.astype(np.float32)


def promote(first: FloatName, second: FloatName) -> FloatName:
    """The precision in which torch computes with two tensors of these precisions."""
    if first == second:
        return first
    return "float64" if "float64" in (first, second) else "float32"


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded: np.ndarray = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded
