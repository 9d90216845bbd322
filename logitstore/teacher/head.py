"""Logits of a model a chunk of positions at a time, exactly as its own forward pass makes them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from logitstore.errors import TeacherError

_LOGGER = logging.getLogger(__name__)

NUM_CHECKED_TOKENS = 16
# Allowed error of the chunked head, as a part of the largest logit: products of another shape round differently, by
# some units of the last place. A forgotten scale or soft-cap is off by whole factors.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


class ChunkedLogits:
    """Runs a model and hands its logits out in chunks.

    The body runs once per batch. For each chunk of hidden states the model runs again with a body that answers with
    that chunk, so whatever it does behind its body (soft-caps, scales) happens exactly. Models whose forward pass goes
    another way round their body are found out by a check on a few tokens, and run as a whole, a sequence at a time.

    Attributes:
        is_chunked: whether the model passed the check.
        width: V, number of logits per position.
    """

    def __init__(
        self, model: PreTrainedModel, chunk_positions: int, num_checked_tokens: int = NUM_CHECKED_TOKENS
    ) -> None:
        self._model = model
        self._chunk_positions = chunk_positions
        reference, difference = self._check(num_checked_tokens)
        self.width = int(reference.shape[-1])
        largest = float(reference.float().nan_to_num(posinf=0.0, neginf=0.0).abs().max())
        tolerance = _TOLERANCE.get(reference.dtype, 1e-4) * max(1.0, largest)
        self.is_chunked = difference is not None and difference <= tolerance
        if not self.is_chunked:
            _LOGGER.warning(
                "%s: the head cannot be run apart from the body (largest difference of a logit: %s); all logits of a "
                "sequence will be held at once, which takes more memory and time",
                type(model).__name__,
                difference,
            )

    @torch.inference_mode()
    def compute(self, sequences: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield logits [R, V] of all positions of all sequences, joined in order; R varies.

        Args:
            sequences: [T] int64 token ids each, on the model's device; lengths may differ.
        """
        if self.is_chunked:
            yield from self._compute_chunked(sequences, self._chunk_positions)
            return
        for token_ids in sequences:
            logits = self._model(input_ids=token_ids[None], use_cache=False).logits[0]
            yield from logits.split(self._chunk_positions)

    def _compute_chunked(self, sequences: list[torch.Tensor], chunk_positions: int) -> Iterator[torch.Tensor]:
        output, hidden_PD = self._run_body(sequences)
        first_token = sequences[0][None, :1]
        for chunk in hidden_PD.split(chunk_positions):
            answer = copy.copy(output)
            answer.last_hidden_state = chunk[None]
            with _answering(self._model.base_model, answer):
                logits = self._model(input_ids=first_token, use_cache=False).logits[0]
            yield logits

    def _run_body(self, sequences: list[torch.Tensor]) -> tuple[Any, torch.Tensor]:
        """The body's output, and its hidden states [P, D] without padding."""
        lengths = [len(token_ids) for token_ids in sequences]
        if len(set(lengths)) == 1:
            output = self._model.base_model(input_ids=torch.stack(sequences), use_cache=False)
            return output, output.last_hidden_state.flatten(0, 1)
        # Padding on the right: nothing before it sees it.
        padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        columns = torch.arange(padded.shape[1], device=padded.device)
        mask = columns < torch.tensor(lengths, device=padded.device)[:, None]
        output = self._model.base_model(input_ids=padded, attention_mask=mask.long(), use_cache=False)
        return output, output.last_hidden_state[mask]

    @torch.inference_mode()
    def _check(self, num_tokens: int) -> tuple[torch.Tensor, float | None]:
        """Reference logits of a few tokens, and how far the chunked ones are off; None where they cannot be had."""
        vocab_size = int(self._model.config.get_text_config().vocab_size)
        token_ids = torch.arange(num_tokens, device=self._model.device) * 7919 % vocab_size
        try:
            reference = self._model(input_ids=token_ids[None], use_cache=False).logits[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise TeacherError(f"{type(self._model).__name__}: cannot run {num_tokens} tokens: {error}") from error
        try:
            # An uneven last chunk, and more than one.
            chunked = torch.cat(list(self._compute_chunked([token_ids], max(1, num_tokens // 3))))
        except Exception as error:  # noqa: BLE001  # a model of unknown build may fail in any way; the fallback is exact
            _LOGGER.info("%s: chunked head: %s: %s", type(self._model).__name__, type(error).__name__, error)
            return reference, None
        if chunked.shape != reference.shape:
            return reference, None
        difference = (chunked.float() - reference.float()).masked_fill(chunked == reference, 0.0)  # both may be -inf
        return reference, float(difference.abs().max())


@contextmanager
def _answering(body: torch.nn.Module, answer: object) -> Iterator[None]:
    """Make a module return `answer`, whatever it is called with."""
    original = vars(body).get("forward")

    def forward(*args: object, **kwargs: object) -> object:
        return answer

    body.forward = forward
    try:
        yield
    finally:
        if original is None:
            del body.forward
        else:
            body.forward = original
