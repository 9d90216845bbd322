"""The compiled loop of the compact codec: the bits that NumPy gives, and no trouble where there is no compiler."""

from __future__ import annotations

import functools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.shard import compact, compiled


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has to be decoded before the compiled loop is loaded."""
    monkeypatch.setattr(compiled, "PATIENCE_ENTRIES", 0)


def build_steps(num_positions: int, top_k: int, largest: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """[P, K] int32 steps and [P] float32 tails, some of which leave nothing."""
    generator = np.random.default_rng(seed)
    steps = generator.integers(0, largest + 1, (num_positions, top_k)).astype(np.int32)
    tails = generator.choice([-np.inf, -20.0, -1.0, -1e-3, 0.0], num_positions).astype(np.float32)
    return steps, tails


def split(steps: np.ndarray) -> np.ndarray:
    """[4, P · K] uint8, the bytes of steps as pages hold them."""
    return np.ascontiguousarray(steps, dtype="<i4").view(np.uint8).reshape(-1, 4).T.copy()


def decode_by_numpy(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    logprobs = np.empty(steps.shape, dtype=np.float32)
    return logprobs, compact._RowSums(*steps.shape).decode(steps, logprobs)


@given(top_k=st.integers(1, compiled.MOST_ENTRIES), largest=st.sampled_from([0, 3, 15]), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_loop_gives_the_bits_that_numpy_gives(top_k: int, largest: int, seed: int) -> None:
    steps, _ = build_steps(5, top_k, largest, seed)
    logprobs, mass = np.empty(steps.shape, dtype=np.float32), np.empty(len(steps))
    assert compiled.decode_rows(split(steps), *compact._build_tables(2048), logprobs, mass)
    expected_logprobs, expected_mass = decode_by_numpy(steps)
    np.testing.assert_array_equal(logprobs, expected_logprobs)
    np.testing.assert_array_equal(mass, expected_mass)


@pytest.mark.parametrize("num_planes", [2, 3, 4])
def test_loop_puts_values_together_from_the_planes_that_there_are(num_planes: int) -> None:
    pytest.importorskip("numba")
    values = np.random.default_rng(0).integers(0, 256, (1000, 4)).astype(np.uint8)
    values[:, num_planes:] = 0
    planes = np.ascontiguousarray(values.T)[:num_planes]
    loops = compiled.compile_loops()
    for join in (compiled.join_planes, loops.join_planes if loops else None):
        assert join is not None
        found = np.empty(900, dtype=np.int32)
        join(planes[:, 50:950], found)
        np.testing.assert_array_equal(found, values[50:950].view("<i4").ravel())


def test_loop_leaves_what_is_far_down_to_numpy() -> None:
    steps = np.array([[1, 2], [1, 65_535]], dtype=np.int32)
    assert not compiled.decode_rows(
        split(steps), *compact._build_tables(2048), np.empty((2, 2), np.float32), np.empty(2)
    )


@pytest.mark.parametrize("top_k", [1, 7, 8, 50, 64, 128])
@pytest.mark.parametrize("largest", [9, 65_535])
def test_compiled_decoding_gives_the_bits_that_numpy_gives(
    eager: None, monkeypatch: pytest.MonkeyPatch, top_k: int, largest: int
) -> None:
    pytest.importorskip("numba")
    steps, tails = build_steps(2 * compiled.ENTRIES_AT_A_TIME // top_k + 3, top_k, largest, seed=top_k)
    steps.flags.writeable = False  # as Arrow's are
    counts = np.full(len(steps), top_k, dtype=np.int32)
    assert compiled.find_loops(steps.shape) is not None
    found = compact.decode_steps(steps.ravel(), counts, tails)
    monkeypatch.setattr(compact, "find_loops", lambda shape: None)
    np.testing.assert_array_equal(found, compact.decode_steps(steps.ravel(), counts, tails))


def test_loop_is_loaded_once_that_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_entries_decoded", 0)
    monkeypatch.setattr(compiled, "PATIENCE_ENTRIES", 1000)
    loops = compiled.Loops(compiled.join_planes, compiled.decode_rows, compiled.add_to_rows)
    monkeypatch.setattr(compiled, "compile_loops", functools.lru_cache(lambda: loops))
    found = [compiled.find_loops((5, 64)) for _ in range(4)]
    assert found == [None, None, None, loops]
    assert compiled.find_loops((5, compiled.MOST_ENTRIES + 1)) is None


_WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
import numpy as np
from logitstore.shard import compact, compiled
compiled.PATIENCE_ENTRIES = 0
steps = np.ones((3, 4), np.int32)
print(compact.decode_steps(steps.ravel(), np.full(3, 4, np.int32), np.full(3, -np.inf, np.float32)).sum().round(3))
"""


def test_numpy_decodes_where_numba_is_missing() -> None:
    done = subprocess.run([sys.executable, "-c", _WITHOUT_NUMBA], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(12 * np.log(0.25), abs=0.05)


def test_loop_is_compiled_where_no_folder_takes_what_was_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numba = pytest.importorskip("numba")
    njit = numba.njit

    def refuse_cache(*arguments: object, cache: bool = False, **options: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*arguments, **options)

    monkeypatch.setattr(numba, "njit", refuse_cache)
    loops = compiled.compile_loops.__wrapped__()
    steps, _ = build_steps(5, 64, 9, seed=1)
    logprobs, mass = np.empty(steps.shape, dtype=np.float32), np.empty(len(steps))
    assert loops is not None
    assert loops.decode_rows(split(steps), *compact._build_tables(2048), logprobs, mass)
    np.testing.assert_array_equal(mass, decode_by_numpy(steps)[1])
