"""Loading of a teacher by its settings."""

from __future__ import annotations

from logitstore.errors import ConfigError, OutsideError
from logitstore.teacher.generation import GenerationSettings
from logitstore.teacher.passing_trouble import find_passing_trouble
from logitstore.teacher.protocol import Method, Teacher, TeacherSettings


def load_teacher(
    settings: TeacherSettings,
    method: Method,
    num_positions: int | None = None,
    *,
    generate: GenerationSettings | None = None,
) -> Teacher:
    """Load the teacher that the settings name, ready to score.

    Args:
        settings: of the teacher.
        method: what is kept of a distribution.
        num_positions: of the longest sequence that will be scored, None for the longest that the model can see; an
            engine that reserves memory for a sequence reserves it for this one.
        generate: how it will be asked for answers, None for not at all; vLLM needs to know.
    Raises:
        ConfigError: the tokenizer does not fit the model, device or engine are not there, or the engine cannot write
            answers in that way.
        TeacherError: the model cannot be loaded.
        OutsideError: the hub, or another server, did not answer: it may later.
    """
    try:
        return _load_teacher(settings, method, num_positions, generate)
    except OutsideError:
        raise
    except Exception as error:
        trouble = find_passing_trouble(error)
        if trouble is None:
            raise
        raise OutsideError(
            f"teacher {settings.model!r}: expected its files, found {type(trouble).__name__}: {trouble}; run the "
            "command again when the hub, or the network, is back"
        ) from error


def _load_teacher(
    settings: TeacherSettings, method: Method, num_positions: int | None, generate: GenerationSettings | None
) -> Teacher:
    if method.kind == "given_ids" and settings.engine != "huggingface":
        raise ConfigError(
            f"method 'given_ids': expected teacher.engine huggingface, found {settings.engine}, which cannot be asked "
            "about given ids yet; set it to huggingface"
        )
    # An engine is imported when it is asked for: they take seconds and gigabytes.
    if settings.engine == "vllm":
        from logitstore.teacher.vllm_install import check_vllm

        check_vllm()
        from logitstore.teacher.vllm_engine import load_vllm_teacher

        return load_vllm_teacher(settings, method, num_positions, generate)
    if settings.engine == "openai_api":
        from logitstore.teacher.openai_api import load_openai_teacher

        return load_openai_teacher(settings, method)
    from logitstore.teacher.huggingface import load_huggingface_teacher

    return load_huggingface_teacher(settings, method)
