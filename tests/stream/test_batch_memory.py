"""Memory of batches: used again once nothing refers to it, and never before."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

from logitstore.stream.batch_memory import BatchMemory

LENGTH = 100_000


def find_address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_used_again_once_the_array_is_gone() -> None:
    memory = BatchMemory()
    array = memory.take(LENGTH, np.int32)
    address = find_address(array)
    del array
    again = memory.take(LENGTH - 5, np.float32)
    assert find_address(again) == address
    assert (again.dtype, again.shape) == (np.float32, (LENGTH - 5,))


@pytest.mark.parametrize("holder", ["slice", "view", "reshaped", "tensor", "memoryview"])
def test_memory_is_left_alone_while_anything_refers_to_it(holder: str) -> None:
    memory = BatchMemory()
    array = memory.take(LENGTH, np.int32)
    array[:] = np.arange(LENGTH)
    if holder == "tensor":
        torch = pytest.importorskip("torch")
        held = torch.from_numpy(array)[10:20]
    else:
        held = {
            "slice": array[10:20],
            "view": array.view(np.float32)[10:20].view(np.int32),
            "reshaped": array.reshape(100, -1)[0, 10:20],
            "memoryview": memoryview(array)[10:20],
        }[holder]
    del array
    gc.collect()
    for _ in range(3):
        memory.take(LENGTH, np.int32)[:] = -1
    assert held.tolist() == list(range(10, 20))


def test_two_arrays_that_are_held_have_no_memory_in_common() -> None:
    memory = BatchMemory()
    arrays = [memory.take(LENGTH, np.int32) for _ in range(10)]
    for number, array in enumerate(arrays):
        array[:] = number
    assert [set(array.tolist()) for array in arrays] == [{number} for number in range(10)]


@pytest.mark.parametrize("length", [LENGTH // 3, LENGTH * 2])
def test_memory_of_another_size_is_let_go(length: int) -> None:
    memory = BatchMemory()
    del (array := [memory.take(LENGTH, np.int32)])[0]
    assert len(memory._free) == 1
    array.append(memory.take(length, np.int32))
    assert len(memory._free) == 0
    assert len(array[0]) == length


def test_no_more_than_a_few_are_kept() -> None:
    memory = BatchMemory()
    arrays = [memory.take(LENGTH, np.int32) for _ in range(50)]
    arrays.clear()
    assert len(memory._free) == 5


@pytest.mark.parametrize("length", [0, 1, 100])
def test_small_arrays_are_numpys_own(length: int) -> None:
    memory = BatchMemory()
    array = memory.take(length, np.int32)
    assert array.base is None
    assert array.shape == (length,)


def test_arrays_outlive_their_memory_s_owner_and_threads_may_let_go_of_them() -> None:
    memory = BatchMemory()
    arrays = [memory.take(LENGTH, np.int32) for _ in range(8)]
    for array in arrays:
        array[:] = 7
    del memory
    gc.collect()
    threads = [threading.Thread(target=arrays.pop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((array == 7).all() for array in arrays)
