"""Answers of a model in the transformers library, each with random numbers of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from logitstore.errors import InvalidLogitsOfSequenceError
from logitstore.teacher.batching import plan_windows
from logitstore.teacher.generation import Answer, GenerationSettings, draw_uniform
from logitstore.teacher.memory_bound import MemoryBound

# Tokens are chosen of so many logits at a time: in float64, sorted and summed, they take a dozen times their memory.
NUM_LOGITS_AT_ONCE = 2**23


def generate_answers(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    settings: GenerationSettings,
    keys: Sequence[int],
    *,
    stop_ids: Collection[int],
    vocab_size: int,
    batch_tokens: int,
) -> Iterator[Answer]:
    """Yield an answer to each prompt, in order; see `protocol.GeneratingTeacher`.

    Prompts of similar length go together, so many that they and the longest answers have `batch_tokens` tokens.

    Args:
        stop_ids: every token that ends an answer, at least one.
        vocab_size: ids from here on are padding of the model's output, and never chosen.
    """
    name = str(model.config.name_or_path)

    def run(batch: list[int]) -> list[Answer]:
        chooser = _Chooser(settings, [keys[i] for i in batch], vocab_size, stop_ids)
        try:
            new_ids = _generate_batch(model, [prompts[i] for i in batch], chooser, sorted(stop_ids))
        except _InvalidRowError as error:
            position = len(prompts[batch[error.row]]) + error.token - 1
            raise InvalidLogitsOfSequenceError(name, batch[error.row], position, error.found) from None
        return [_cut(row, stop_ids) for row in new_ids]

    lengths = [len(prompt) + settings.max_new_tokens for prompt in prompts]
    bound = MemoryBound(name, lengths, run)
    for batches in plan_windows(lengths, batch_tokens):
        answers: dict[int, Answer] = {}
        for batch in batches:
            answers.update(zip(batch, bound.run(batch), strict=True))
        for i in sorted(answers):
            yield answers[i]


def list_stop_ids(model: PreTrainedModel, end_of_text_id: int) -> frozenset[int]:
    """Tokens after which the model's publisher and its tokenizer stop."""
    named = getattr(model.generation_config, "eos_token_id", None)
    stops = [] if named is None else [named] if isinstance(named, int) else list(named)
    return frozenset({*map(int, stops), end_of_text_id})


@torch.inference_mode()
def _generate_batch(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], chooser: _Chooser, stop_ids: list[int]
) -> np.ndarray:
    """[B, N] new tokens; what comes after a stop is padding."""
    longest = max(len(prompt) for prompt in prompts)
    # Padding on the left: every row's next token is behind its last column.
    input_ids = torch.full((len(prompts), longest), stop_ids[0], dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    # A model brings its publisher's settings, penalties and the like, which fill in whatever a call leaves open.
    published, model.generation_config = model.generation_config, GenerationConfig()
    generate: Any = model.generate
    try:
        output: torch.Tensor = generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=chooser.settings.max_new_tokens,
                eos_token_id=stop_ids,
                pad_token_id=stop_ids[0],
            ),
            logits_processor=LogitsProcessorList([chooser]),
        )
    finally:
        model.generation_config = published
    new_ids: np.ndarray = output[:, longest:].cpu().numpy()
    return new_ids


def _cut(row: np.ndarray, stop_ids: Collection[int]) -> Answer:
    ends = np.flatnonzero(np.isin(row, list(stop_ids)))
    stop = int(ends[0]) + 1 if len(ends) else len(row)
    return Answer(token_ids=row[:stop].astype(np.int32), is_finished=len(ends) > 0)


class _InvalidRowError(Exception):
    """A row of a batch that has no finite largest logit for its next token, `token` tokens behind its prompt."""

    def __init__(self, row: int, token: int, found: str) -> None:
        super().__init__(row, token, found)
        self.row, self.token, self.found = row, token, found


class _Chooser(LogitsProcessor):
    """Chooses the next token of every row with the row's own random numbers, and leaves generate() no choice.

    One uniform number per token, and the token at that place of the cumulative distribution: so what is drawn depends
    on the row alone, where torch's own sampling depends on all rows that happen to be in the batch.
    """

    def __init__(
        self, settings: GenerationSettings, keys: Sequence[int], vocab_size: int, stop_ids: Collection[int]
    ) -> None:
        self.settings = settings
        self._stop_ids = torch.tensor(sorted(stop_ids))
        self._has_ended = torch.zeros(len(keys), dtype=torch.bool)
        self._keys = keys
        self._vocab_size = vocab_size
        self._token = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._check(scores[:, : self._vocab_size])
        uniform = [draw_uniform(key, self._token) for key in self._keys]
        self._token += 1
        num_rows = max(1, NUM_LOGITS_AT_ONCE // self._vocab_size)
        parts = zip(
            scores[:, : self._vocab_size].split(num_rows),
            torch.tensor(uniform, dtype=torch.float64).split(num_rows),
            strict=True,
        )
        chosen = torch.cat([self._choose(logits_BV, uniform_B) for logits_BV, uniform_B in parts])
        self._has_ended |= torch.isin(chosen[:, 0].cpu(), self._stop_ids)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    def _check(self, logits_BV: torch.Tensor) -> None:
        highest_B = logits_BV.amax(-1)
        is_finite_B = highest_B.isfinite().cpu() | self._has_ended  # behind an end, nothing is asked for
        if not is_finite_B.all():
            row = int((~is_finite_B).int().argmax())
            raise _InvalidRowError(row, self._token, f"{float(highest_B[row])} among them")

    def _choose(self, logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
        if self.settings.temperature == 0.0:
            return logits_BV.argmax(-1, keepdim=True)
        return choose_tokens(logits_BV.double(), self.settings, uniform_B)


def choose_tokens(logits_BV: torch.Tensor, settings: GenerationSettings, uniform_B: torch.Tensor) -> torch.Tensor:
    """[B, 1] ids at places `uniform_B`, in [0, 1), of the distributions that the settings leave of the logits."""
    probabilities = (logits_BV / settings.temperature).softmax(-1)
    ids = None
    if settings.top_k is not None or settings.top_p is not None:
        kept = min(settings.top_k or probabilities.shape[-1], probabilities.shape[-1])
        probabilities, ids = probabilities.topk(kept, dim=-1)
    if settings.top_p is not None:
        # The token that reaches the mass is kept; of top_k tokens, the mass is that of what they leave.
        mass_before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.where(mass_before < settings.top_p * probabilities.sum(-1, keepdim=True), 0.0)
    cumulative = probabilities.cumsum(-1)
    places = uniform_B.to(cumulative.device)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, places, right=True)
    # Rounding may put the place at the very end: behind the last token that can be drawn.
    last = probabilities.shape[-1] - 1 - (probabilities.flip(-1) > 0).double().argmax(-1, keepdim=True)
    index = torch.minimum(index, last)
    return index if ids is None else ids.gather(1, index)
