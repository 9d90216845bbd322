"""What a teacher is: its settings, its identity, and what it can be asked."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)

from logitstore.records import Signal
from logitstore.settings import Settings
from logitstore.teacher.generation import Answer, GenerationSettings
from logitstore.teacher.openai_api_settings import OpenAiSettings

if TYPE_CHECKING:  # it imports transformers, which reading a store does without
    from logitstore.teacher.tokenizer import TeacherTokenizer

# At less than 1 the normalizer tells nothing that the likeliest ids do not; above 100 nothing is left of a teacher.
Temperature = Annotated[float, Field(gt=1.0, le=100.0)]
# Where the weights were found, and which release ran them, changes no more than rounding.
_NOT_COMPARED = frozenset({"model", "tokenizer", "engine_version"})


class VllmSettings(Settings):
    """What the vLLM engine alone can be told; what it has in common with others stands in `TeacherSettings`.

    Attributes:
        tensor_parallel_size: GPUs that each layer is split over.
        pipeline_parallel_size: groups of so many GPUs, each with some of the layers; a teacher takes the product of
            both, and an actor asks for as many.
        across_machines: the GPUs may be of several machines; else they are those of one.
        gpu_memory_utilization: part of a GPU's memory that weights, logits and the cache of keys and values may fill.
        kv_cache_bytes: cache of keys and values, instead of what is left of that; on a CPU 1 GiB where it is None. For
            a capture of answers each of the two engines has one.
        generation_memory_share: for a capture of answers, part of that memory that the engine which writes them gets;
            the other part is the scoring engine's. Each of them holds the weights.
    """

    tensor_parallel_size: int = Field(default=1, ge=1)
    pipeline_parallel_size: int = Field(default=1, ge=1)
    across_machines: bool = False
    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    kv_cache_bytes: int | None = Field(default=None, ge=1)
    generation_memory_share: float = Field(default=0.5, gt=0.0, lt=1.0)


class TeacherSettings(Settings):
    """Which model teaches, and how it is run.

    Attributes:
        engine: what runs it: the transformers library, or vLLM, which is faster and splits models over GPUs; or an
            endpoint that answers prompts.
        model: folder, or name on the Hugging Face hub; of an endpoint, what it calls the model.
        revision: branch, tag or commit of a model on the hub.
        tokenizer: folder or name, where it is not the model's own.
        dtype: "auto" takes the precision that the weights are stored in.
        device: "auto" takes the GPU where there is one.
        batch_tokens: tokens of one forward pass, padding included; vLLM has none, and cuts longer sequences.
        head_chunk_positions: positions whose logits are held at once; bounds memory at this times the vocabulary.
        trust_remote_code: whether a model may bring its own code.
        vllm: more about that engine.
        openai_api: the endpoint.
    """

    engine: Literal["huggingface", "vllm", "openai_api"] = "huggingface"
    model: str
    revision: str | None = None
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_tokens: int = Field(default=8192, ge=1)
    head_chunk_positions: int = Field(default=512, ge=1)
    trust_remote_code: bool = False
    vllm: VllmSettings | None = None
    openai_api: OpenAiSettings | None = None

    @model_validator(mode="after")
    def _check_engine(self) -> TeacherSettings:
        if self.vllm is not None and self.engine != "vllm":
            raise ValueError(f"vllm: expected engine 'vllm' beside it, found {self.engine!r}; leave one of them out")
        if (self.openai_api is not None) != (self.engine == "openai_api"):
            raise ValueError(
                f"openai_api: expected engine 'openai_api' beside it, and the other way round, found {self.engine!r}"
            )
        if self.engine == "openai_api" and self.tokenizer is None:
            raise ValueError("tokenizer: expected that of the endpoint's model, found none; name it")
        return self

    @property
    def num_gpus(self) -> int:
        """GPUs that one such teacher runs on, where there are any."""
        return self.vllm.tensor_parallel_size * self.vllm.pipeline_parallel_size if self.vllm is not None else 1


class _Method(Settings):
    """What all methods have in common."""

    temperatures: tuple[Temperature, ...] = Field(default=(), max_length=16)

    @field_validator("temperatures")
    @classmethod
    def _check_temperatures(cls, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        if list(temperatures) != sorted(set(temperatures)):
            raise ValueError(f"expected every temperature once and in ascending order, found {list(temperatures)}")
        return temperatures

    @model_serializer(mode="wrap")
    def _leave_out_no_temperatures(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plans without temperatures are what they were before there were any."""
        values: dict[str, Any] = serialize(self)
        if not self.temperatures:
            values.pop("temperatures", None)
        return values


class TopKMethod(_Method):
    """Keep the likeliest ids of every position.

    Attributes:
        temperatures: above 1, at which the normalizer of the whole distribution is kept, besides; a student can be
            taught at these and at 1.
        k: how many at most.
        top_p: keep no more than it takes to reach this mass, or None for always k.
        min_k: keep at least these many, whatever `top_p` says.
    """

    kind: Literal["top_k"] = "top_k"
    k: int = Field(default=64, ge=1)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    min_k: int = Field(default=1, ge=1)

    @property
    def is_drawn(self) -> bool:
        return False

    @model_validator(mode="after")
    def _check_min_k(self) -> TopKMethod:
        if self.min_k > self.k:
            raise ValueError(f"min_k: expected at most k = {self.k}, found {self.min_k}")
        return self


class SampleMethod(_Method):
    """Draw ids from the whole distribution and keep how often each came; random sampling, arXiv:2503.16870.

    Attributes:
        temperatures: as of `TopKMethod`.
        num_draws: how many at every position, with replacement; counts fit the store's column up to 65,535.
    """

    kind: Literal["sample"] = "sample"
    num_draws: int = Field(default=50, ge=1, le=65_535)

    @property
    def is_drawn(self) -> bool:
        return True


class HeadTailMethod(_Method):
    """Keep the likely ids of every position, and draw some of the others by systematic sampling.

    Attributes:
        temperatures: as of `TopKMethod`.
        threshold: ids of at least this probability are kept; the rest is drawn in slots of about this mass each. Fewer
            than 2 / threshold + 1 entries come of it at a position, far fewer where the distribution is peaked.
    """

    kind: Literal["head_tail"] = "head_tail"
    threshold: float = Field(default=1 / 28, ge=1e-4, le=1.0)  # below, a position takes megabytes to compute

    @property
    def is_drawn(self) -> bool:
        return True


class GivenIdsMethod(_Method):
    """Keep the ids that the corpus names at every position (`corpus.given_ids.candidates_field`), likeliest first.

    Attributes:
        temperatures: as of `TopKMethod`.
    """

    kind: Literal["given_ids"] = "given_ids"

    @property
    def is_drawn(self) -> bool:
        return False


def _read_kind(method: object) -> object:
    """Settings that name no kind mean top_k, the default."""
    return method.get("kind", "top_k") if isinstance(method, dict) else getattr(method, "kind", None)


Method: TypeAlias = Annotated[
    Annotated[TopKMethod, Tag("top_k")]
    | Annotated[SampleMethod, Tag("sample")]
    | Annotated[HeadTailMethod, Tag("head_tail")]
    | Annotated[GivenIdsMethod, Tag("given_ids")],
    Discriminator(
        _read_kind,
        custom_error_type="unknown_method",
        custom_error_message="expected a kind of method, one of top_k, sample, head_tail, given_ids",
    ),
]
"""What of a distribution is kept. Where `is_drawn`, some of it is drawn at random, and the teacher needs keys."""


class TeacherIdentity(Settings):
    """What makes two teachers the same.

    Attributes:
        model: the name as it was given; not compared.
        tokenizer: likewise, None for the model's own; not compared.
        engine: what ran it; "imported" where another program did and a data set was all there was.
        engine_version: releases of the engine; not compared.
        architecture: class of the model.
        dtype: precision of the weights in memory.
        weights_fingerprint: see `fingerprint.py`; of an imported data set, how it was read.
        tokenizer_fingerprint: see `tokenizer.py`.
        chat_template_fingerprint: sha256 of the tokenizer's template for conversations, None where it has none.
        vocab_size: ids that the tokenizer can emit.
        padded_vocab_size: width of the model's output, at least `vocab_size`.
        max_positions: longest sequence, None where the model has no limit.
        end_of_text_id: what follows a document.
        stop_ids: tokens that the model's publisher and its tokenizer end answers with, ascending; none where an engine
            does not tell, or writes no answers. Compared for captures of answers alone.
    """

    model: str
    tokenizer: str | None = None
    engine: Literal["huggingface", "vllm", "openai_api", "imported"]
    engine_version: str
    architecture: str
    dtype: str
    weights_fingerprint: str
    tokenizer_fingerprint: str
    chat_template_fingerprint: str | None = None
    vocab_size: int = Field(ge=1)
    padded_vocab_size: int = Field(ge=1)
    max_positions: int | None
    end_of_text_id: int = Field(ge=0)
    stop_ids: tuple[int, ...] = ()

    @property
    def tokenizer_name(self) -> str:
        """What to load the tokenizer from."""
        return self.tokenizer or self.model

    def differences(self, other: TeacherIdentity, *, writes_answers: bool = False) -> list[str]:
        """One line per field that tells two teachers apart, with both values; empty for the same teacher."""
        not_compared = _NOT_COMPARED if writes_answers else _NOT_COMPARED | {"stop_ids"}
        pairs = (
            (name, getattr(self, name), getattr(other, name))
            for name in type(self).model_fields
            if name not in not_compared
        )
        return [f"{name}: {mine!r} / {theirs!r}" for name, mine, theirs in pairs if mine != theirs]


class Teacher(Protocol):
    """A loaded model that scores sequences."""

    @property
    def identity(self) -> TeacherIdentity: ...

    @property
    def tokenizer(self) -> TeacherTokenizer:
        """For prompts and conversations; texts are encoded by `encode`."""
        ...

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        ...

    def score(self, sequences: Sequence[np.ndarray], draw_keys: Sequence[int] | None = None) -> Iterator[Signal]:
        """Yield the signal of each sequence, in order, holding few of them at once.

        Args:
            sequences: [T + 1] int32 token ids each; the signal has T positions.
            draw_keys: of each sequence, in [0, 2**64) (see `draw_key.py`): what is drawn at a position depends on the
                key, the position and the model's logits there, not on the other sequences. Methods that draw nothing
                need none and pass over them.
        Raises:
            ConfigError: a sequence is longer than the model can see, or has no position, or a method that draws has not
                one key for each sequence; before anything is computed.
            TeacherError: an id is outside the vocabulary, or the model's logits cannot be used.
        """
        ...


@runtime_checkable
class AskedTeacher(Teacher, Protocol):
    """A teacher that can be asked about ids of somebody else's choice."""

    def score_given(self, sequences: Sequence[np.ndarray], candidates: Sequence[np.ndarray]) -> Iterator[Signal]:
        """Yield the signal of each sequence, in order, with supports of its candidates; by method `given_ids` alone.

        Args:
            sequences: as for `score`.
            candidates: of each sequence, [T, C] integers: ids below the vocabulary's size, negative where there are
                fewer than C.
        Raises:
            ConfigError, TeacherError: as for `score`; or candidates do not fit their sequences.
        """
        ...


@runtime_checkable
class GeneratingTeacher(Teacher, Protocol):
    """A teacher that also writes answers to prompts."""

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        settings: GenerationSettings,
        keys: Sequence[int],
        stop_ids: Collection[int] = (),
    ) -> Iterator[Answer]:
        """Yield an answer to each prompt, in order, holding few of them at once.

        An answer depends on its prompt and key, and on the others only as far as an engine rounds differently in
        another batch.

        Args:
            prompts: [N] int32 token ids each, N >= 1; for several answers to one prompt, the prompt several times.
            settings: how tokens are chosen; `num_answers` is the caller's business.
            keys: of each answer, in [0, 2**64): see `generation.build_answer_key`.
            stop_ids: tokens that end an answer, besides those that the model and its tokenizer name.
        Raises:
            ConfigError: a prompt is empty, or leaves no room for an answer; before anything is computed.
            TeacherError: an id is outside the vocabulary, or the model's logits cannot be used.
        """
        ...
