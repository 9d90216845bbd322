"""A teacher that runs in the transformers library."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.hub import cached_file

from logitstore.errors import ConfigError, TeacherError
from logitstore.records import Signal
from logitstore.teacher.batching import plan_windows
from logitstore.teacher.fingerprint import compute_weights_fingerprint
from logitstore.teacher.head import NUM_CHECKED_TOKENS, ChunkedLogits
from logitstore.teacher.protocol import Method, TeacherIdentity, TeacherSettings
from logitstore.teacher.sparsify import InvalidLogitsError, SparseRows, sparsify
from logitstore.teacher.tokenizer import TeacherTokenizer, load_tokenizer

# On a CPU, logits are sparsified this many at a time: temporaries of 8 MB are used again, larger ones come from the
# system each time, which takes twice as long (V = 151,936, k = 64: 570 against 1,100 us per position on one core).
NUM_LOGITS_AT_ONCE = 2**21


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
        self._logits = ChunkedLogits(
            model, settings.head_chunk_positions, min(NUM_CHECKED_TOKENS, max_positions or NUM_CHECKED_TOKENS)
        )
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
    def is_head_chunked(self) -> bool:
        """Whether the head runs in chunks, or the model as a whole (see `head.ChunkedLogits`)."""
        return self._logits.is_chunked

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer.encode(texts)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids)

    def score(self, sequences: Sequence[np.ndarray]) -> Iterator[Signal]:
        """See `protocol.Teacher.score`; wrong sequences are refused by the call itself, not by the first `next`."""
        for i, token_ids in enumerate(sequences):
            self._check_sequence(i, token_ids)
        return self._score(sequences)

    def _check_sequence(self, i: int, token_ids: np.ndarray) -> None:
        positions, longest = len(token_ids) - 1, self._identity.max_positions
        if positions < 1 or (longest is not None and positions > longest):
            raise ConfigError(
                f"teacher {self._settings.model!r}: sequence {i}: expected at least 1 position and at most "
                f"{longest or 'any number'}, found {positions}; set the length of sequences to what the model can see"
            )
        lowest, highest = int(token_ids.min()), int(token_ids.max())
        if lowest < 0 or highest >= self._identity.vocab_size:
            raise TeacherError(
                f"teacher {self._settings.model!r}: sequence {i}: expected ids in [0, {self._identity.vocab_size}), "
                f"found {lowest if lowest < 0 else highest}; encode the text with the teacher's own tokenizer"
            )

    def _score(self, sequences: Sequence[np.ndarray]) -> Iterator[Signal]:
        lengths = [len(token_ids) - 1 for token_ids in sequences]
        for batches in plan_windows(lengths, self._settings.batch_tokens):
            signals: dict[int, Signal] = {}
            for batch in batches:
                signals.update(zip(batch, self._score_batch(batch, sequences), strict=True))
            for i in sorted(signals):
                yield signals[i]

    @torch.inference_mode()
    def _score_batch(self, batch: list[int], sequences: Sequence[np.ndarray]) -> list[Signal]:
        device = self._model.device
        token_ids = [torch.from_numpy(sequences[i].astype(np.int64)).to(device) for i in batch]
        next_ids = torch.cat([ids[1:] for ids in token_ids])
        offsets = np.cumsum([0] + [len(ids) - 1 for ids in token_ids])
        chunks: list[_Columns] = []
        start = 0
        for logits_RV in self._compute_logits([ids[:-1] for ids in token_ids]):
            stop = start + len(logits_RV)
            try:
                rows = sparsify(logits_RV, next_ids[start:stop], self._method)
            except InvalidLogitsError as error:
                place = int(np.searchsorted(offsets, start + error.row, side="right")) - 1
                raise TeacherError(
                    f"teacher {self._settings.model!r}: sequence {batch[place]}, position "
                    f"{start + error.row - offsets[place]}: expected finite logits, found {error.found}; "
                    "try another dtype or check the weights"
                ) from error
            chunks.append(_Columns.from_rows(rows))
            start = stop
        return _Columns.join(chunks).split(offsets)

    def _compute_logits(self, sequences: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield logits [R, V] over the tokenizer's ids: columns beyond them are padding and carry no probability."""
        vocab_size = self._identity.vocab_size
        for logits in self._logits.compute(sequences):
            num_rows = max(1, NUM_LOGITS_AT_ONCE // vocab_size) if logits.device.type == "cpu" else len(logits)
            yield from logits[:, :vocab_size].split(num_rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Columns:
    """Signals of many positions, one after the other; columns as in `Signal`."""

    support_counts: np.ndarray
    support_ids: np.ndarray
    support_logprobs: np.ndarray
    tail_logprob: np.ndarray
    entropy: np.ndarray
    next_token_logprob: np.ndarray

    @classmethod
    def from_rows(cls, rows: SparseRows) -> _Columns:
        is_kept = torch.arange(rows.ids.shape[1], device=rows.ids.device) < rows.counts[:, None]
        return cls(
            support_counts=rows.counts.int().cpu().numpy(),
            support_ids=rows.ids[is_kept].int().cpu().numpy(),
            support_logprobs=rows.logprobs[is_kept].cpu().numpy(),
            tail_logprob=rows.tail_logprob.cpu().numpy(),
            entropy=rows.entropy.cpu().numpy(),
            next_token_logprob=rows.next_token_logprob.cpu().numpy(),
        )

    @classmethod
    def join(cls, chunks: list[_Columns]) -> _Columns:
        names = cls.__dataclass_fields__
        return cls(**{name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in names})

    def split(self, offsets: np.ndarray) -> list[Signal]:
        """Signals of the sequences that own positions `offsets[i] : offsets[i + 1]`."""
        entry_offsets = np.concatenate([[0], np.cumsum(self.support_counts, dtype=np.int64)])[offsets]
        return [
            Signal(
                support_counts=self.support_counts[start:stop],
                support_ids=self.support_ids[first:last],
                support_logprobs=self.support_logprobs[first:last],
                tail_logprob=self.tail_logprob[start:stop],
                entropy=self.entropy[start:stop],
                next_token_logprob=self.next_token_logprob[start:stop],
            )
            for (start, stop), (first, last) in zip(
                itertools.pairwise(offsets.tolist()), itertools.pairwise(entry_offsets.tolist()), strict=True
            )
        ]


def load_huggingface_teacher(settings: TeacherSettings, method: Method) -> HuggingFaceTeacher:
    """Load model and tokenizer and check the chunked head on a few tokens.

    Raises:
        ConfigError: the tokenizer does not fit the model or cannot be loaded, or the device is not there.
        TeacherError: the model cannot be loaded.
    """
    device = _choose_device(settings)
    tokenizer = load_tokenizer(
        settings.tokenizer or settings.model,
        revision=None if settings.tokenizer else settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            settings.model,
            revision=settings.revision,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
        )
        folder = _find_folder(settings)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise TeacherError(
            f"teacher {settings.model!r}: cannot be loaded: {error}; give a folder made by save_pretrained, or a name "
            "on the hub"
        ) from error
    model.to(device).eval()  # type: ignore[arg-type]  # transformers wraps `to` in a way that hides self
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
