"""Teachers inside vLLM's workers: its models, with a pooler that cuts every position's distribution to its support.

`LlamaForCausalLMLogitstoreTeacher` is an attribute of this module, made when it is asked for, and so on for every name.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.layers.pooler.common import PoolingParamsUpdate
from vllm.model_executor.models.registry import ModelRegistry

from logitstore.teacher.draws import DrawKeys
from logitstore.teacher.huggingface import NUM_LOGITS_AT_ONCE
from logitstore.teacher.memory_bound import give_back_memory, is_out_of_memory
from logitstore.teacher.protocol import Method
from logitstore.teacher.sparse_rows import InvalidLogitsError
from logitstore.teacher.sparsify import Scratch, sparsify
from logitstore.teacher.vllm_packing import (
    RowLayout,
    RowPlaces,
    find_invalid_rows,
    join_packed,
    mark_invalid_rows,
    pack_rows,
)
from logitstore.teacher.vllm_plugin import SCORER_SUFFIX

TASK = "token_classify"  # the one of vLLM's tasks that gives back a row for each token and takes any width


class TeacherPooler(Pooler):  # type: ignore[misc]  # vLLM is not there for the type checker
    """Gives back packed sparse rows (see `vllm_packing.py`) of every sequence whose last token has been seen.

    Logits exist for `chunk_positions` rows at a time, whatever sequences they belong to. vLLM runs its poolers when it
    measures how much memory is left for the cache of keys and values, so that peak is in its account.
    """

    def __init__(self, model: Any, method: Method, vocab_size: int, chunk_positions: int) -> None:
        super().__init__()
        # As an attribute of a module, the model would become its own grandchild.
        object.__setattr__(self, "_model", model)
        self._method = method
        self._vocab_size = vocab_size
        self._chunk_positions = chunk_positions
        self._layout = RowLayout.of_method(method)
        self._scratch = Scratch()
        self._has_invalid_rows = False

    def get_supported_tasks(self) -> set[str]:
        """See vLLM's Pooler."""
        return {TASK}

    def get_pooling_updates(self, task: str) -> Any:
        """See vLLM's Pooler: the metadata shall have the prompts' ids."""
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: Any) -> list[torch.Tensor | None]:
        """See vLLM's Pooler.

        Args:
            hidden_states: [R, D], the tokens of this step, sequence after sequence.
            pooling_metadata: which sequences those are, and how much of each this step has.
        """
        places = locate_rows(pooling_metadata, hidden_states.device)
        num_rows = len(places.positions)
        packed = [
            part
            for start in range(0, num_rows, self._chunk_positions)
            for part in self._score_chunk(hidden_states, places, start, min(start + self._chunk_positions, num_rows))
        ]
        rows = join_packed(packed, self._layout)
        if self._has_invalid_rows:
            self._has_invalid_rows = False
            clean_caches(self._model)
        return stitch_sequences(rows, pooling_metadata, self._layout)

    def _score_chunk(self, hidden_RD: torch.Tensor, places: RowPlaces, start: int, stop: int) -> list[torch.Tensor]:
        """Packed rows of a chunk; where memory runs out, of its halves, since an exception would end the engine."""
        try:
            return self._score(hidden_RD, places, start, stop)
        except Exception as error:
            # Workers that share a model take every step together: one alone must not take two in place of one.
            if stop - start == 1 or get_tensor_model_parallel_world_size() > 1 or not is_out_of_memory(error):
                raise
        give_back_memory()
        middle = (start + stop) // 2
        return [
            *self._score_chunk(hidden_RD, places, start, middle),
            *self._score_chunk(hidden_RD, places, middle, stop),
        ]

    def _score(self, hidden_RD: torch.Tensor, places: RowPlaces, start: int, stop: int) -> list[torch.Tensor]:
        logits_RV = self._model.compute_logits(hidden_RD[start:stop])
        if logits_RV.shape[-1] < self._vocab_size:
            raise ValueError(f"logits: expected {self._vocab_size} ids or more, found {logits_RV.shape[-1]}")
        logits_RV = logits_RV[:, : self._vocab_size]
        step = max(1, NUM_LOGITS_AT_ONCE // self._vocab_size) if logits_RV.device.type == "cpu" else stop - start
        return [
            self._cut(logits, places[i : i + len(logits)])
            for i, logits in zip(range(start, stop, step), logits_RV.split(step), strict=True)
        ]

    def _cut(self, logits_RV: torch.Tensor, places: RowPlaces) -> torch.Tensor:
        randomness = DrawKeys(keys=places.draw_keys, positions=places.positions) if self._method.is_drawn else None
        try:
            return pack_rows(
                sparsify(logits_RV, places.next_ids, self._method, randomness, scratch=self._scratch), places
            )
        except InvalidLogitsError:
            # An exception would end the engine. The rows say themselves what is wrong with them.
            usable = logits_RV.masked_fill(find_invalid_rows(logits_RV)[:, None], 0.0)
            packed = pack_rows(
                sparsify(usable, places.next_ids, self._method, randomness, scratch=self._scratch), places
            )
            mark_invalid_rows(packed, logits_RV, self._layout)
            self._has_invalid_rows = True
            return packed


def clean_caches(model: torch.nn.Module) -> None:
    """Take NaN and infinities out of the caches of keys and values, in place.

    They would outlive their sequence: not every attention kernel keeps what a block held before from those who get it
    next, since a weight of 0 does not help against NaN. The sequence itself is lost by the rows that it has already.
    """
    for module in model.modules():
        caches = getattr(module, "kv_cache", None)
        for cache in [caches] if isinstance(caches, torch.Tensor) else caches or []:
            if isinstance(cache, torch.Tensor) and cache.is_floating_point():
                cache.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def locate_rows(metadata: Any, device: torch.device) -> RowPlaces:
    """Which position of which sequence each row of a step is, by the engine's own books."""
    cursor = metadata.get_pooling_cursor()
    columns: list[np.ndarray] = []
    sequences = zip(
        metadata.prompt_token_ids_cpu,
        metadata.pooling_params,
        cursor.seq_lens_cpu.tolist(),
        cursor.num_scheduled_tokens_cpu.tolist(),
        metadata.prompt_lens.tolist(),
        strict=True,
    )
    for prompt, params, stop, num_tokens, prompt_length in sequences:
        extra = params.extra_kwargs or {}  # vLLM's rehearsals have none
        known = prompt[stop - num_tokens : min(stop, prompt_length)].numpy()
        rows = np.zeros((4, num_tokens), dtype=np.int64)
        rows[0] = np.arange(stop - num_tokens, stop)
        rows[1, : len(known)] = known
        rows[2, :-1] = rows[1, 1:]
        rows[2, -1] = extra.get("next_id", 0) if stop >= prompt_length else int(prompt[stop])
        rows[3] = extra.get("draw_key", 0)
        columns.append(rows)
    positions, token_ids, next_ids, draw_keys = torch.from_numpy(np.concatenate(columns, axis=1)).to(device)
    return RowPlaces(positions=positions, token_ids=token_ids, next_ids=next_ids, draw_keys=draw_keys)


def stitch_sequences(rows: torch.Tensor, metadata: Any, layout: RowLayout) -> list[torch.Tensor | None]:
    """Rows of each sequence of a step: all of them where this step ends the sequence, None where more will come.

    Earlier parts wait in the sequence's state. A sequence that vLLM has thrown out for lack of memory begins again
    from 0, and what is there from its first attempt is dropped.
    """
    cursor = metadata.get_pooling_cursor()
    lengths = cursor.num_scheduled_tokens_cpu.tolist()
    stops = cursor.seq_lens_cpu.tolist()
    prompt_lengths = metadata.prompt_lens.tolist()
    outputs: list[torch.Tensor | None] = []
    offsets = itertools.accumulate(lengths, initial=0)
    for state, offset, length, stop, prompt_length in zip(
        metadata.pooling_states, offsets, lengths, stops, prompt_lengths, strict=False
    ):
        part = rows[offset : offset + length]
        waiting = state.hidden_states_cache
        drop_from(waiting, stop - length)
        if stop >= prompt_length:
            outputs.append(join_packed([*waiting, part], layout))
            waiting.clear()
        else:
            waiting.append(part.clone())  # a view would keep the rows of the others
            outputs.append(None)
    return outputs


def drop_from(parts: list[torch.Tensor], start: int) -> None:
    """Leave `start` rows in a list of parts, in place."""
    while parts and (excess := sum(map(len, parts)) - start) > 0:
        last = parts.pop()
        if len(last) > excess:
            parts.append(last[:-excess])


def _build_teacher(base: Any, name: str) -> type:
    class Teacher(base):  # type: ignore[misc]  # made at run time
        is_pooling_model = True

        def __init__(self, *, vllm_config: Any, prefix: str = "", **options: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **options)
            config = vllm_config.model_config.hf_config
            self.pooler = TeacherPooler(
                self,
                TypeAdapter(Method).validate_json(config.logitstore_method),
                config.logitstore_vocab_size,
                config.logitstore_chunk_positions,
            )

    Teacher.__name__ = Teacher.__qualname__ = name
    Teacher.__module__ = __name__
    return Teacher


def load_base(name: str, suffix: str) -> Any:
    """vLLM's model that a teacher of this name is made of."""
    return ModelRegistry._try_load_model_cls(name.removesuffix(suffix))


def __getattr__(name: str) -> type:
    if not name.endswith(SCORER_SUFFIX):
        raise AttributeError(name)
    teacher = _build_teacher(load_base(name, SCORER_SUFFIX), name)
    globals()[name] = teacher
    return teacher
