"""Which sequences go through the model together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

# Sequences are sorted by length within windows of this many batches: padding stays small, and results, which are
# given back in the order that was asked for, do not pile up.
NUM_BATCHES_PER_WINDOW = 8


def plan_windows(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[list[int]]]:
    """Yield windows of consecutive sequences, each as batches of indices into `lengths`.

    A batch costs its longest length times its number of sequences, at most `batch_tokens` unless it is one sequence.
    Within a window batches go from long to short, so that memory peaks at once rather than late.
    """
    start = num_tokens = 0
    for i, length in enumerate(lengths):
        if i > start and num_tokens + length > NUM_BATCHES_PER_WINDOW * batch_tokens:
            yield plan_batches(range(start, i), lengths, batch_tokens)
            start, num_tokens = i, 0
        num_tokens += length
    if start < len(lengths):
        yield plan_batches(range(start, len(lengths)), lengths, batch_tokens)


def plan_batches(indices: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Every index once, in batches of similar length."""
    batches: list[list[int]] = []
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
