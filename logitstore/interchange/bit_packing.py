"""Integers of any width as bytes, the way DistillKit packs them: big end first, every row padded to whole bytes."""

from __future__ import annotations

import numpy as np


def count_packed_bytes(num_elements: int, element_bits: int) -> int:
    """Bytes that a row of packed integers takes."""
    return (num_elements * element_bits + 7) // 8


def pack_bits(values: np.ndarray, element_bits: int) -> np.ndarray:
    """[R, N] integers as [R, ceil(N · bits / 8)] uint8.

    Args:
        values: [R, N] integers in [0, 2^bits).
        element_bits: 1 to 64.
    """
    rows, elements = values.shape
    big_endian = np.ascontiguousarray(values.astype(">u8")).view(np.uint8).reshape(rows, elements, 8)
    bits = np.unpackbits(big_endian, axis=-1)[:, :, 64 - element_bits :]
    return np.packbits(bits.reshape(rows, elements * element_bits), axis=-1)


def unpack_bits(packed: np.ndarray, element_bits: int, num_elements: int) -> np.ndarray:
    """Undo `pack_bits`: [R, N] int64 from [R, M] uint8, M at least what N elements take."""
    rows = len(packed)
    bits = np.unpackbits(packed, axis=-1, count=num_elements * element_bits)
    whole = np.zeros((rows, num_elements, 64), dtype=np.uint8)
    whole[:, :, 64 - element_bits :] = bits.reshape(rows, num_elements, element_bits)
    values: np.ndarray = np.packbits(whole, axis=-1).view(">u8").reshape(rows, num_elements).astype(np.int64)
    return values
