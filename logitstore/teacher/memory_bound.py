"""Batches that are halved where memory runs out."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

from logitstore.errors import OutOfMemoryOfSequenceError

_LOG = logging.getLogger(__name__)
# What is no OutOfMemoryError: torch's allocator for CPUs, libraries of CUDA that allocate for themselves.
_MESSAGE = re.compile(r"can't allocate memory|not enough memory|out of memory|_ALLOC_FAILED|bad_alloc", re.IGNORECASE)
_LONGEST_FOUND = 120

Result = TypeVar("Result")


class MemoryBound(Generic[Result]):
    """Runs batches of sequences, one after the other, each in as many parts as memory asks for.

    A batch for which memory runs out is run again in halves, down to single sequences, and later batches of that many
    tokens begin with halves. A sequence that fails alone is given a second try, with all memory given back before.

    Args:
        teacher: what to call it in messages.
        lengths: tokens of each sequence; with padding, a batch has the longest one's times its number of sequences.
        run: makes the results of some sequences, in their order.
    """

    def __init__(self, teacher: str, lengths: Sequence[int], run: Callable[[list[int]], Sequence[Result]]) -> None:
        self._teacher, self._lengths, self._run = teacher, lengths, run
        self._too_many: int | None = None

    def run(self, batch: list[int]) -> list[Result]:
        """Results of a batch of sequences, in order.

        Raises:
            OutOfMemoryOfSequenceError: there is not enough memory for one of them alone.
        """
        num_tokens = len(batch) * max(self._lengths[i] for i in batch)
        if len(batch) > 1 and self._too_many is not None and num_tokens >= self._too_many:
            return self._run_halves(batch)
        results, found = self._try(batch)
        if results is None and len(batch) > 1:
            self._too_many = num_tokens
            _LOG.warning(
                "teacher %r: memory ran out with %d sequences, %d tokens; going on with half as many (%s)",
                self._teacher,
                len(batch),
                num_tokens,
                found,
            )
            return self._run_halves(batch)
        if results is None:
            results, found = self._try(batch)
        if results is None:
            raise OutOfMemoryOfSequenceError(self._teacher, batch[0], self._lengths[batch[0]], found)
        return results

    def _run_halves(self, batch: list[int]) -> list[Result]:
        middle = len(batch) // 2
        return self.run(batch[:middle]) + self.run(batch[middle:])

    def _try(self, batch: list[int]) -> tuple[list[Result] | None, str]:
        """Results, or None and what was found where memory ran out; it has been given back then."""
        try:
            return list(self._run(batch)), ""
        except Exception as error:  # allocators have no class in common
            if not is_out_of_memory(error):
                raise
            found = (str(error) or type(error).__name__).strip().partition("\n")[0][:_LONGEST_FOUND]
        give_back_memory()  # behind the `except`: until there the traceback holds what the failed try had in memory
        return None, found


def give_back_memory() -> None:
    """Let go of what nobody refers to any more, in Python and on the GPU."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, of whatever device or library, has said that there is not enough memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _MESSAGE.search(str(error)) is not None
