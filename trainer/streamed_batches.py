"""The micro-batches of a stream as the loader of a trainer of transformers, and a callback that keeps their place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from logitstore.errors import ConfigError
from logitstore.records import RecordBatch
from logitstore.stream.iterator import RecordStream
from trainer.batch import TrainBatch
from trainer.micro_batches import split_batch
from trainer.prefetch import Prefetcher
from trainer.stream_config import StreamSettings

_LOGGER = logging.getLogger(__name__)


class StreamedBatches:
    """The micro-batches of a stream, without end; each iteration goes on where the last one was.

    Its length is that of a whole training: a trainer that goes on behind its last step then knows that it is done, and
    makes none more.
    """

    def __init__(
        self,
        stream: RecordStream,
        *,
        steps: int,
        num_parts: int,
        collate: Callable[[RecordBatch], TrainBatch],
        device: torch.device,
    ) -> None:
        """Remember what to do; nothing is read yet.

        Args:
            stream: stays where it is, iterations read from a copy.
            steps: of the training.
            num_parts: micro-batches of a step.
            collate: a micro-batch into tensors on the CPU.
            device: that the tensors go to.
        """
        self._stream = stream.split(0, 1)
        self._steps, self._num_parts, self._collate, self._device = steps, num_parts, collate, device
        self._feed: Prefetcher | None = None

    def __len__(self) -> int:
        return self._steps * self._num_parts

    def __iter__(self) -> Iterator[dict[str, Any]]:
        settings = StreamSettings()
        feed = Prefetcher(
            self._stream.split(0, 1),
            split=self._split,
            collate=self._collate,
            device=self._device,
            ahead=settings.prefetch_micro_batches,
        )
        with closing(feed):
            self._feed = feed
            try:
                for prepared in feed:
                    for batch in prepared.micro_batches:
                        # The trainer counts operations and tokens by these two.
                        yield {"batch": batch, "input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            finally:
                self._stream.load_state_dict(feed.state_dict())
                self._feed = None

    def state_dict(self) -> dict[str, Any]:
        """The stream's state after the step that was taken last."""
        return self._stream.state_dict() if self._feed is None else self._feed.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin the next iteration at a state.

        Raises:
            IncompatibleStoreError: the state belongs to other records or another order.
        """
        self._stream.load_state_dict(state)

    def _split(self, records: RecordBatch) -> Sequence[RecordBatch]:
        if len(records) % self._num_parts or not len(records):
            raise ConfigError(
                f"stream: expected records of a step for {self._num_parts} micro-batches of the same size, found "
                f"{len(records)}; use a stream with tail 'drop'"
            )
        return list(split_batch(records, len(records) // self._num_parts))


class StreamPosition(TrainerCallback, ExportableState):
    """Keeps the position of a trainer's stream in trainer_state.json, and goes there when training begins."""

    def __init__(self, batches: StreamedBatches) -> None:
        self._batches = batches

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go to the position of the checkpoint that training goes on from, or stay."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is None:  # of a checkpoint that another trainer wrote
            step = self._batches.state_dict()["step"]
            _LOGGER.warning("the checkpoint has no position of a stream: records are read from step %d on", step)
            state.stateful_callbacks[type(self).__name__] = self.state()  # where Trainer writes the next one
            return
        self._batches.load_state_dict(saved["attributes"])

    def state(self) -> dict[str, Any]:
        """What transformers writes into a checkpoint."""
        return {"args": {}, "attributes": self._batches.state_dict()}
