"""RecordStream: an endless iterator over a rank's part of every global batch, read ahead by threads."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from logitstore.errors import ConfigError, IncompatibleStoreError
from logitstore.records import RecordBatch
from logitstore.shard.compiled import expect_entries
from logitstore.store.aligned_stores import AlignedStores
from logitstore.store.logit_store import LogitStore
from logitstore.stream.mixture import MixtureOrder
from logitstore.stream.order import DEFAULT_LANES, DEFAULT_WINDOW_ROW_GROUPS, StreamOrder, Tail
from logitstore.stream.read_ahead import ClosedError, ReadAhead
from logitstore.stream.read_plan import ReadPlan
from logitstore.stream.scratch import ScratchSettings, ScratchStatistics
from logitstore.stream.skipping import check_skip, skip_steps
from logitstore.stream.source import StreamSource
from logitstore.stream.source_order import OrderSettings, compute_fingerprint, is_mixture, read_mixture_state
from logitstore.stream.source_reader import SourceReader
from logitstore.stream.subset import RecordSubset


class RecordStream:
    """This rank's records of global batch 0, 1, 2, … of a store, or of a mixture of stores, over epochs without end.

    The state is one integer: `step`, the global batch that comes next. The same global batches come at any world size
    that divides the batch. An error in a reading thread is raised by `next`, at the step that needs the data; calling
    `next` again asks for the data again, so a loop may decide to outwait a storage that is away for longer.

    Threads start with the first `next`. They read ahead and join batches while the caller works, and do not keep the
    interpreter from leaving. A stream that is pickled, or that is used on in a fork, opens its stores anew and begins
    there where it is, with threads of its own.

    Memory: `window_row_groups` decoded row groups of every lane of this rank and a quarter as many that are read ahead,
    see `stream.read_plan`; the records of three steps; and what `threads` decode at the moment.

    Args:
        store: an open store; several with the same records, whose batches then are `AlignedBatch`es; or a list of
            sources to mix, see `stream.mixture`. One source alone is the store alone, unless it has a name: then it is
            a mixture, and others may be added when a run goes on.
        subset: what to read of it: records, or row groups as [·] integers, ascending; everything by default.
        row_groups: another name for a subset of row groups.
        global_batch_sequences: records of one step over all ranks.
        seed: decides the order together with the store.
        rank, world_size: this process, and how many there are.
        start_step: the first step to deliver.
        skip: half-open ranges of steps that are left out, such as ((100, 120),); the others keep their numbers.
        tail: what becomes of the records behind the last full batch of an epoch of a store: "drop" leaves them out,
            another part of the records in each epoch; "short" delivers them as one smaller batch, of which a rank may
            have no record. A mixture of sources has none: their epochs follow one another.
        lanes, window_row_groups: see `stream.order`.
        read_ahead_steps: how many steps ahead row groups are asked for at most.
        read_ahead_row_groups: how many row groups are held for later steps alone; see `stream.read_plan`.
        threads: how many read and decode.
        with_documents: whether the records name their documents.
        scratch: where to keep what was decompressed for later epochs, if anywhere; needs xxhash.
    Raises:
        ConfigError: the world size does not divide the batch, the store is too small for one, or the scratch cannot be
            written.
        IncompatibleStoreError: records of the sources cannot be joined to one batch.
    """

    def __init__(
        self,
        store: LogitStore | AlignedStores | Sequence[StreamSource],
        *,
        global_batch_sequences: int,
        seed: int = 0,
        subset: RecordSubset | np.ndarray | None = None,
        row_groups: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        skip: Sequence[tuple[int, int]] = (),
        tail: Tail = "drop",
        lanes: int = DEFAULT_LANES,
        window_row_groups: int = DEFAULT_WINDOW_ROW_GROUPS,
        read_ahead_steps: int = 64,
        read_ahead_row_groups: int | None = None,
        threads: int = 4,
        with_documents: bool = False,
        scratch: ScratchSettings | None = None,
    ) -> None:
        _check_ranks(rank, world_size, global_batch_sequences)
        if threads < 1 or read_ahead_steps < 0 or (read_ahead_row_groups or 0) < 0:
            raise ConfigError(
                "stream: expected a thread or more, and nothing negative to read ahead, found "
                f"{threads} threads, {read_ahead_steps} steps and {read_ahead_row_groups} row groups"
            )
        sources = _list_sources(store, subset, row_groups)
        self._reader = SourceReader(sources, with_documents=with_documents, scratch=scratch)
        self._skip = check_skip(skip)
        self._order_settings = OrderSettings(
            global_batch_sequences=global_batch_sequences,
            seed=seed,
            lanes=lanes,
            window_row_groups=window_row_groups,
            tail=tail,
        )
        self._plan_options: dict[str, Any] = {
            "rank": rank,
            "world_size": world_size,
            "skip": self._skip,
            "steps_ahead": read_ahead_steps,
            "row_groups_ahead": read_ahead_row_groups,
        }
        self._options: dict[str, Any] = {
            **asdict(self._order_settings),
            "rank": rank,
            "world_size": world_size,
            "skip": self._skip,
            "read_ahead_steps": read_ahead_steps,
            "read_ahead_row_groups": read_ahead_row_groups,
            "threads": threads,
            "with_documents": with_documents,
            "scratch": scratch,
        }
        self.rank, self.world_size, self.global_batch_sequences = rank, world_size, global_batch_sequences
        self._threads = threads
        self._step = skip_steps(_check_step(start_step), self._skip)
        # What a mixture goes on from: a state of it, and the step.
        self._origin: tuple[Mapping[str, Any] | None, int] = (None, 0)
        self._fingerprint: str | None = None
        self._ahead: ReadAhead | None = None
        self._is_closed = self._is_under_way = False
        self.data_wait_seconds = 0.0
        self.order = self._build_order()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(RecordStream, **self._options), (self._reader.sources,), self.state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.load_state_dict(state)

    @property
    def sources(self) -> tuple[StreamSource, ...]:
        """What the stream reads."""
        return self._reader.sources

    @property
    def step(self) -> int:
        """The step that comes next, which is the number of its global batch."""
        return self._step

    @property
    def scratch_statistics(self) -> ScratchStatistics | None:
        """What the scratch did for this stream; None where it has none."""
        scratch = self._reader.scratch
        return None if scratch is None else scratch.statistics

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch, a short one included where the tail is one; of a mixture, about as many as take
        all records of its sources once."""
        return self.order.batches_per_epoch

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the records and their order: two streams with the same one deliver the same batches."""
        if self._fingerprint is None:
            self._fingerprint = compute_fingerprint(self.sources, self.order)
        return self._fingerprint

    def __iter__(self) -> Iterator[RecordBatch]:
        return self

    def __next__(self) -> RecordBatch:
        started = time.perf_counter()
        try:
            batch = self._take()
        finally:
            self.data_wait_seconds += time.perf_counter() - started
        if not self._is_under_way:  # not before: the first batch would wait for what only pays off over many
            self._is_under_way = True
            expect_entries(self._reader.estimate_entries() // self.world_size)
        self._step = skip_steps(self._step + 1, self._skip)
        return batch

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """What `load_state_dict` needs to go on at a step, by default the next one, on any number of ranks.

        Plain values, which JSON keeps.
        """
        state: dict[str, Any] = {"step": self.step if step is None else step, "fingerprint": self.fingerprint}
        if isinstance(self.order, MixtureOrder):
            state["mixture"] = self.order.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a stream over the same records in the same order stopped.

        A stream of several sources also goes on from one with other sources, weights or sequences per batch: these
        take effect now, and no record of an epoch is lost or repeated by it. From one over one of its sources alone, it
        does so at the end of an epoch.

        Raises:
            IncompatibleStoreError: the state belongs to other records or another order.
            ConfigError: its step is below 0, or one before the last change of a mixture.
        """
        step = _check_step(state["step"])
        if is_mixture(self.sources):
            found = read_mixture_state(state, self.sources, self._order_settings)
            order = self._order_settings.build(self.sources, found, step)
            assert isinstance(order, MixtureOrder)
            # A copy: what is done to the state that was given has no say any more.
            self._origin, self.order, self._fingerprint = (order.state_dict(), step), order, None
        elif state["fingerprint"] != self.fingerprint:
            raise IncompatibleStoreError(
                "stream: the saved position belongs to other records or another order\n"
                f"  in the state:    {state['fingerprint']}\n  in this stream:  {self.fingerprint}\n"
                "use the same manifest, held-out part, seed and global batch, or start anew"
            )
        self._stop_reading()
        self._step = skip_steps(step, self._skip)

    def split(self, part: int, num_parts: int) -> RecordStream:
        """A stream of its own over a part of this rank's records: all parts, joined, are what this one delivers.

        Raises:
            ConfigError: the parts do not divide this rank's share of a global batch.
        """
        options = dict(self._options)
        rank, world_size, batch = (options[name] for name in ("rank", "world_size", "global_batch_sequences"))
        if not 0 <= part < num_parts or batch % (world_size * num_parts):
            raise ConfigError(
                f"stream: expected a part in [0, {num_parts}) of parts that share the {batch // world_size} of {batch} "
                f"sequences of one of {world_size} rank(s) evenly, found part {part}; use a number of workers that "
                "divides them"
            )
        options.update(rank=rank * num_parts + part, world_size=world_size * num_parts)
        stream = RecordStream(self.sources, **options)
        stream.load_state_dict(self.state_dict())
        return stream

    def close(self) -> None:
        """Stop reading ahead, without waiting for what is being read; the stream cannot be used any more."""
        self._is_closed = True
        self._stop_reading()

    def _take(self) -> RecordBatch:
        if self._reader.is_of_another_process:  # this is a fork: it has neither threads nor clients of storages
            self._ahead, self._reader = None, self._reader.reopen()
        while True:
            if self._is_closed:
                raise ConfigError("stream: expected an open stream, found one that was closed; open it anew")
            ahead = self._ahead
            if ahead is None:
                # The threads have an order of their own: one that is asked from two sides at once would be mixed up.
                plan = ReadPlan(self._build_order(), **self._plan_options, step=self._step)
                ahead = ReadAhead(plan, read=self._reader.read_packed, join=self._reader.join, threads=self._threads)
                self._ahead = ahead
            try:
                step, batch = ahead.take()
            except ClosedError:
                self._ahead = None
                continue
            if step == self._step:
                return batch
            self._stop_reading()  # an interrupt came between a batch and its delivery

    def _build_order(self) -> StreamOrder | MixtureOrder:
        state, step = self._origin
        return self._order_settings.build(self.sources, state, step)

    def _stop_reading(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()


def _check_ranks(rank: int, world_size: int, global_batch_sequences: int) -> None:
    if not 0 <= rank < world_size:
        raise ConfigError(f"stream: expected a rank in [0, {world_size}), found {rank}")
    if global_batch_sequences % world_size:
        raise ConfigError(
            f"stream: {world_size} ranks cannot share a global batch of {global_batch_sequences} sequences evenly; "
            "use a world size that divides it"
        )


def _check_step(step: int) -> int:
    if step < 0:
        raise ConfigError(f"stream: expected a step of 0 or more, found {step}")
    return int(step)


def _list_sources(
    store: LogitStore | AlignedStores | Sequence[StreamSource],
    subset: RecordSubset | np.ndarray | None,
    row_groups: np.ndarray | None,
) -> list[StreamSource]:
    if subset is not None and row_groups is not None:
        raise ConfigError("stream: expected a subset or row groups, found both; give one of them")
    chosen = row_groups if subset is None else subset
    if isinstance(store, LogitStore | AlignedStores):
        return [StreamSource(store, subset=chosen)]
    if chosen is not None:
        raise ConfigError("stream: expected the subset of every source with the source, found one for all of them")
    if not store:
        raise ConfigError("stream: expected at least one source, found none")
    return list(store)
