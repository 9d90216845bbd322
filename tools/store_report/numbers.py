"""Numbers of up to three significant digits in two bytes, as the page shows them."""

from __future__ import annotations

import numpy as np

# Above all codes of numbers: how often a token was drawn, and what is no number.
FIRST_DRAWS = 32768
INFINITE = 65534
UNKNOWN = 65535
# 900 mantissas, 100 to 999, of every power of ten from here on.
LOWEST_EXPONENT = -15
_MANTISSAS = 900
# Powers of ten of what is nearer to 0 do not come out.
_LEAST = 1e-300
_LARGEST = (FIRST_DRAWS - 2) // _MANTISSAS * _MANTISSAS


def encode_numbers(values: np.ndarray) -> np.ndarray:
    """Numbers, none below 0, as codes that are in their order.

    0 is 0; m · 10^(e - 2) with m from 100 to 999 is 1 + 900 · (e + 15) + m - 100. What is less than 10^-15 is 1; NaN
    and infinity have codes of their own.

    Args:
        values: [N] float.
    Returns:
        [N] uint16.
    """
    numbers = np.asarray(values, dtype=np.float64)
    is_number = np.isfinite(numbers) & (numbers > 0)
    positive = np.where(is_number, np.clip(numbers, _LEAST, 1 / _LEAST), 1.0)
    exponents = np.floor(np.log10(positive)).astype(np.int64)
    mantissas = np.rint(positive / 10.0 ** (exponents - 2.0)).astype(np.int64)  # 1000 is the next power's 100
    codes = 1 + _MANTISSAS * (exponents - LOWEST_EXPONENT) + mantissas - 100
    codes = np.where(is_number, np.clip(codes, 1, _LARGEST), 0)
    codes = np.where(np.isposinf(numbers), INFINITE, codes)
    found: np.ndarray = np.where(np.isnan(numbers), UNKNOWN, codes).astype(np.uint16)
    return found


def encode_shares(values: np.ndarray) -> np.ndarray:
    """[N] uint16 codes of probabilities, or of anything else of which two digits do below 0.1: 12.3% and 1.2%."""
    numbers = np.asarray(values, dtype=np.float64)
    is_small = (numbers > _LEAST) & (numbers < 0.1)
    small = np.where(is_small, numbers, 1.0)
    steps = 10.0 ** (np.floor(np.log10(small)) - 1)
    return encode_numbers(np.where(is_small, np.rint(small / steps) * steps, numbers))


def encode_nats(values: np.ndarray) -> np.ndarray:
    """[N] uint16 codes of nats to two decimals, of three digits at most; what is below 0 by a rounding is 0."""
    return encode_numbers(np.round(np.asarray(values, dtype=np.float64), 2))


def encode_draws(draws: np.ndarray) -> np.ndarray:
    """[N] uint16 codes of how often tokens were drawn; beyond 32,000 times is 32,000."""
    codes: np.ndarray = (FIRST_DRAWS + np.minimum(draws.astype(np.int64), 32_000)).astype(np.uint16)
    return codes
