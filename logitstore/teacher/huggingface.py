"""A teacher that runs in the transformers library."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.hub import cached_file

from logitstore.errors import ConfigError, InvalidLogitsOfSequenceError, TeacherError
from logitstore.records import Signal
from logitstore.teacher.attention import choose_attention
from logitstore.teacher.batching import plan_windows
from logitstore.teacher.draw_key import check_draw_keys
from logitstore.teacher.draws import DrawKeys
from logitstore.teacher.fingerprint import compute_weights_fingerprint
from logitstore.teacher.generation import Answer, GenerationSettings
from logitstore.teacher.head import NUM_CHECKED_TOKENS, ChunkedLogits, LogitsPart
from logitstore.teacher.huggingface_generation import generate_answers, list_stop_ids
from logitstore.teacher.memory_bound import MemoryBound
from logitstore.teacher.protocol import Method, TeacherIdentity, TeacherSettings
from logitstore.teacher.row_threads import RowThreads
from logitstore.teacher.sequence_check import check_candidates, check_prompts, check_sequences
from logitstore.teacher.signal_columns import SignalColumns
from logitstore.teacher.sparsify import InvalidLogitsError, Scratch, sparsify
from logitstore.teacher.tokenizer import TeacherTokenizer, load_tokenizer

# On a CPU, logits are sparsified this many at a time: few enough to stay near the processor, enough that the calls
# do not count.
NUM_LOGITS_AT_ONCE = 2**21
# A head's weights are read once for each thread's positions, so these should not be few.
FEWEST_POSITIONS_OF_THREAD = 128


class HuggingFaceTeacher:
    """A causal language model and its tokenizer; see `protocol.Teacher`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: TeacherTokenizer,
        method: Method,
        settings: TeacherSettings,
        weights_fingerprint: str,
    ) -> None:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        max_positions = limit if isinstance(limit, int) and limit > 0 else None
        self._model = model
        self._tokenizer = tokenizer
        self._method = method
        self._settings = settings
        self._row_threads = RowThreads(model.device, settings.head_chunk_positions // FEWEST_POSITIONS_OF_THREAD)
        self._logits = ChunkedLogits(model, min(NUM_CHECKED_TOKENS, max_positions or NUM_CHECKED_TOKENS))
        self._identity = TeacherIdentity(
            model=settings.model,
            tokenizer=settings.tokenizer,
            engine="huggingface",
            engine_version=f"transformers {transformers.__version__}, torch {torch.__version__}",
            architecture=type(model).__name__,
            dtype=str(model.dtype).removeprefix("torch."),
            weights_fingerprint=weights_fingerprint,
            tokenizer_fingerprint=tokenizer.fingerprint,
            chat_template_fingerprint=tokenizer.chat_template_fingerprint,
            vocab_size=tokenizer.vocab_size,
            padded_vocab_size=self._logits.width,
            max_positions=max_positions,
            end_of_text_id=tokenizer.end_of_text_id,
            stop_ids=tuple(sorted(list_stop_ids(model, tokenizer.end_of_text_id))),
        )
        if self._logits.width < tokenizer.vocab_size:
            raise ConfigError(
                f"teacher {settings.model!r}: the tokenizer has more ids than the model has outputs; "
                f"name the model's own tokenizer\n  ids of the tokenizer: {tokenizer.vocab_size}\n"
                f"  outputs of the model: {self._logits.width}"
            )

    @property
    def identity(self) -> TeacherIdentity:
        return self._identity

    @property
    def tokenizer(self) -> TeacherTokenizer:
        return self._tokenizer

    @property
    def is_head_chunked(self) -> bool:
        """Whether the head runs in chunks, or the model as a whole (see `head.ChunkedLogits`)."""
        return self._logits.is_chunked

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer.encode(texts)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids)

    def score(self, sequences: Sequence[np.ndarray], draw_keys: Sequence[int] | None = None) -> Iterator[Signal]:
        """See `protocol.Teacher.score`; wrong arguments are refused by the call itself, not by the first `next`."""
        check_sequences(self._identity, sequences, self._identity.max_positions)
        if self._method.kind == "given_ids":
            raise ConfigError("method 'given_ids': expected candidates beside every sequence, found none")
        return self._score(sequences, check_draw_keys(self._method, draw_keys, len(sequences)))

    def score_given(self, sequences: Sequence[np.ndarray], candidates: Sequence[np.ndarray]) -> Iterator[Signal]:
        """See `protocol.AskedTeacher.score_given`; wrong arguments are refused by the call itself."""
        check_sequences(self._identity, sequences, self._identity.max_positions)
        check_candidates(self._identity, sequences, candidates)
        return self._score(sequences, None, candidates)

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        settings: GenerationSettings,
        keys: Sequence[int],
        stop_ids: Collection[int] = (),
    ) -> Iterator[Answer]:
        """See `protocol.GeneratingTeacher`; wrong prompts are refused by the call itself, not by the first `next`."""
        check_prompts(self._identity, prompts, settings)
        return generate_answers(
            self._model,
            prompts,
            settings,
            keys,
            stop_ids={*self._identity.stop_ids, *stop_ids},
            vocab_size=self._identity.vocab_size,
            batch_tokens=self._settings.batch_tokens,
        )

    def _score(
        self,
        sequences: Sequence[np.ndarray],
        draw_keys: Sequence[int] | None,
        candidates: Sequence[np.ndarray] | None = None,
    ) -> Iterator[Signal]:
        lengths = [len(token_ids) - 1 for token_ids in sequences]
        run = partial(self._score_batch, sequences=sequences, draw_keys=draw_keys, candidates=candidates)
        bound = MemoryBound(self._settings.model, lengths, run)
        for batches in plan_windows(lengths, self._settings.batch_tokens):
            signals: dict[int, Signal] = {}
            for batch in batches:
                signals.update(zip(batch, bound.run(batch), strict=True))
            for i in sorted(signals):
                yield signals[i]

    @torch.inference_mode()
    def _score_batch(
        self,
        batch: list[int],
        sequences: Sequence[np.ndarray],
        draw_keys: Sequence[int] | None,
        candidates: Sequence[np.ndarray] | None,
    ) -> list[Signal]:
        device = self._model.device
        token_ids = [torch.from_numpy(sequences[i].astype(np.int64)).to(device) for i in batch]
        next_ids = torch.cat([ids[1:] for ids in token_ids])
        lengths = [len(ids) - 1 for ids in token_ids]
        offsets = np.cumsum([0, *lengths])
        randomness = None if draw_keys is None else DrawKeys.build([draw_keys[i] for i in batch], lengths, device)
        candidates_RC = None if candidates is None else _join_candidates([candidates[i] for i in batch]).to(device)
        asked = _AskedRows(next_ids=next_ids, randomness=randomness, candidates=candidates_RC)
        chunks: list[SignalColumns] = []
        first = 0
        try:
            for part in self._logits.compute([ids[:-1] for ids in token_ids]):
                asked_of_part = asked[first : first + part.num_positions]
                step = self._choose_step(part.num_positions)
                score_rows = partial(self._score_rows, part, asked_of_part, step)
                for columns in self._row_threads.map(score_rows, range(0, part.num_positions, step)):
                    chunks += columns
                first += part.num_positions
        except InvalidLogitsError as error:
            row = first + error.row
            place = int(np.searchsorted(offsets, row, side="right")) - 1
            position = row - int(offsets[place])
            raise InvalidLogitsOfSequenceError(self._settings.model, batch[place], position, error.found) from error
        return SignalColumns.join(chunks).split(offsets)

    def _choose_step(self, num_positions: int) -> int:
        """Positions of a thread at a time: no more at once than the settings allow, and as many for each thread."""
        num_rounds = math.ceil(num_positions / self._settings.head_chunk_positions)
        return math.ceil(num_positions / (num_rounds * self._row_threads.num_threads))

    def _score_rows(
        self, part: LogitsPart, asked: _AskedRows, num_rows: int, start: int, scratch: Scratch
    ) -> list[SignalColumns]:
        """What is kept of `num_rows` rows from a start on."""
        # Columns beyond the tokenizer's ids are padding and carry no probability.
        logits_RV = part.compute(start, min(start + num_rows, part.num_positions))[:, : self._identity.vocab_size]
        num_rows_at_once = num_rows if logits_RV.device.type != "cpu" else NUM_LOGITS_AT_ONCE // logits_RV.shape[1] or 1
        columns: list[SignalColumns] = []
        for logits in logits_RV.split(num_rows_at_once):
            some = asked[start : start + len(logits)]
            try:
                rows = sparsify(logits, some.next_ids, self._method, some.randomness, some.candidates, scratch)
            except InvalidLogitsError as error:
                raise InvalidLogitsError(start + error.row, error.found) from None
            columns.append(SignalColumns.from_rows(rows))
            start += len(logits)
        return columns


@dataclass(frozen=True, kw_only=True)
class _AskedRows:
    """What goes with R rows of logits; see `sparsify`."""

    next_ids: torch.Tensor
    randomness: DrawKeys | None
    candidates: torch.Tensor | None

    def __getitem__(self, rows: slice) -> _AskedRows:
        return _AskedRows(
            next_ids=self.next_ids[rows],
            randomness=self.randomness and self.randomness[rows],
            candidates=None if self.candidates is None else self.candidates[rows],
        )


def _join_candidates(candidates: list[np.ndarray]) -> torch.Tensor:
    """[R, C] int64, C that of the widest."""
    width = max(ids.shape[1] for ids in candidates)
    parts = [np.pad(ids, ((0, 0), (0, width - ids.shape[1])), constant_values=-1) for ids in candidates]
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def load_huggingface_teacher(settings: TeacherSettings, method: Method) -> HuggingFaceTeacher:
    """Load model and tokenizer and check the chunked head on a few tokens.

    Raises:
        ConfigError: the tokenizer does not fit the model or cannot be loaded, or the device is not there.
        TeacherError: the model cannot be loaded, or some of its weights are not there.
    """
    device = _choose_device(settings)
    tokenizer = load_tokenizer(
        settings.tokenizer or settings.model,
        revision=None if settings.tokenizer else settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(  # a pair, which its type does not say
            settings.model,
            revision=settings.revision,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
        )
        folder = _find_folder(settings)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise TeacherError(
            f"teacher {settings.model!r}: cannot be loaded: {error}; give a folder made by save_pretrained, or a name "
            "on the hub"
        ) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise TeacherError(
            f"teacher {settings.model!r}: expected all of its weights, found none for {', '.join(missing[:5])}"
            f"{' and others' if len(missing) > 5 else ''}; transformers would make them up at random: give a model "
            "that was saved with them"
        )
    choose_attention(model)
    model.to(device).eval()
    return HuggingFaceTeacher(model, tokenizer, method, settings, compute_weights_fingerprint(folder))


def _choose_device(settings: TeacherSettings) -> str:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("teacher.device: expected a CUDA device, found none; set it to auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device


def _find_folder(settings: TeacherSettings) -> Path:
    """Where the files of a model lie: the folder given, or the snapshot in the hub's cache."""
    config = cached_file(settings.model, "config.json", revision=settings.revision)
    if config is None:
        raise OSError("there is no config.json")
    return Path(config).parent
