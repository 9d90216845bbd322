"""The README.md of a finished student: where it comes from, how it was taught, and what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from logitstore import __version__
from logitstore.settings import Settings
from logitstore.store.logit_store import LogitStore
from logitstore.stream.where import Where
from logitstore.url_secrets import hide_secrets
from trainer.config import TrainSettings
from trainer.evaluation import Evaluation
from trainer.stores import RunStores

# Figure, its name on a card, its unit, and what the hub calls it where it has a name for it.
_FIGURES = (
    ("lm_loss", "loss on the text", "nats per token"),
    ("perplexity", "perplexity", ""),
    ("teacher_lm_loss", "the teacher's loss on the text", "nats per token"),
    ("bucket_kl", "KL(teacher, student)", "nats, outside of the support as one bucket"),
    ("kl_estimate", "KL(teacher, student)", "nats, estimated from drawn supports"),
    ("overlap", "overlap with the teacher", "Σ min(p, q), 1 is best"),
    ("top1_agreement", "top-1 agreement with the teacher", "share of positions"),
    ("calibration_error", "calibration error", "%"),
    ("bits_per_byte", "bits per byte of the text", ""),
    ("teacher_bits_per_byte", "the teacher's bits per byte", ""),
    ("span_kl", "KL(teacher, student) per span of text", "nats"),
)


def build_model_card(
    settings: TrainSettings,
    stores: RunStores,
    *,
    steps: int,
    positions: int,
    evaluation: Evaluation | None,
    skipped_steps: int = 0,
) -> str:
    """The card of a student, in Markdown behind front matter that the Hugging Face hub reads.

    Addresses are without secrets.

    Args:
        settings: of its run.
        stores: that it was taught from.
        steps: optimizer steps it made, those that were skipped included.
        positions: it was trained on, over all steps.
        evaluation: on held-out records; None where nothing was held out.
        skipped_steps: that left the student as it was, because loss or gradient were not finite.
    """
    name = Path(settings.output).resolve().name
    teachers = [_name_model(store.plan.teacher.model) for store in (*stores.teachers, *stores.corpora)]
    taught_by = " and ".join(f"`{teacher}`" for teacher in dict.fromkeys(teachers))
    how = (
        f"trained on the text of a store of {taught_by}, without its teacher's signals"
        if settings.loss.kind == "cross_entropy"
        else f"distilled from {taught_by}"
    )
    sections = [
        f"---\n{_build_front_matter(settings, name, evaluation)}\n---",
        f"# {name}",
        f"A language model {how} with logitstore {__version__}.",
        "## Where it comes from",
        *(_describe_store(store, where) for store, where in _list_read(settings, stores)),
        "## How it was taught",
        _build_table(("", ""), list(_list_training(settings, steps, positions, skipped_steps))),
        "## What was measured",
        _describe_evaluation(settings, evaluation),
        "## How to run it",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "path/to/this/folder"\n'
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)\n"
        'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n```",
        "Or with vLLM: `vllm serve path/to/this/folder`.",
    ]
    return "\n\n".join(sections) + "\n"


def _build_front_matter(settings: TrainSettings, name: str, evaluation: Evaluation | None) -> str:
    scalars = {} if evaluation is None else evaluation.list_scalars()
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="logitstore",
            dataset_name="held-out records of the store",
            metric_type=figure,
            metric_name=f"{label} ({unit})" if unit else label,
            metric_value=scalars[figure],
        )
        for figure, label, unit in _FIGURES
        if figure in scalars
    ]
    card = ModelCardData(
        base_model=_find_base_model(settings),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["distillation", "knowledge-distillation", "logitstore"],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return card.to_yaml().strip()


def _find_base_model(settings: TrainSettings) -> str | None:
    """The student's origin, where it is a name on the hub."""
    origin = settings.student.from_teacher.model if settings.student.from_teacher else settings.student.model
    is_name = origin is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", origin) and not Path(origin).exists()
    return origin if is_name else None


def _list_read(settings: TrainSettings, stores: RunStores) -> Iterator[tuple[LogitStore, Where | None]]:
    """Every store with the conditions that its records meet; further teachers speak about the records of the first."""
    yield from ((store, settings.where) for store in stores.teachers)
    yield from zip(stores.corpora, (corpus.where for corpus in settings.further_corpora), strict=True)


def _describe_store(store: LogitStore, where: Where | None) -> str:
    plan = store.plan
    method = " ".join(f"{name}={value}" for name, value in _list_values(plan.method) if name != "kind")
    rows = [
        ("store", f"`{hide_secrets(store.url)}`"),
        ("store's fingerprint", f"`{store.fingerprint}`"),
        ("manifest", str(store.manifest_number)),
        ("teacher", f"`{_name_model(plan.teacher.model)}` ({plan.teacher.architecture}, {plan.teacher.dtype})"),
        ("teacher's weights", f"`{plan.teacher.weights_fingerprint}`"),
        ("tokenizer's fingerprint", f"`{plan.teacher.tokenizer_fingerprint}`"),
        ("capture method", f"{plan.method.kind} {method}".strip()),
        ("codec", " ".join(f"{name}={value}" for name, value in _list_values(plan.shard.codec))),
    ]
    if where is not None:
        conditions = where.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        rows.append(("records", f"those that meet `{json.dumps(conditions, ensure_ascii=False)}`"))
    return _build_table(("", ""), rows)


def _list_training(
    settings: TrainSettings, steps: int, positions: int, skipped_steps: int
) -> Iterator[tuple[str, str]]:
    student = settings.student
    if student.from_teacher is not None:
        yield "began as", f"a cut of the teacher: {_describe(student.from_teacher)}"
    else:
        yield "began as", "fresh weights" if student.model is None else f"`{_name_model(student.model)}`"
    if student.lora is not None:
        yield "adapters", f"LoRA, {_describe(student.lora)}; merged here, and kept in `adapter`"
    yield "loss", _describe(settings.loss)
    if settings.other_tokenizer is not None and settings.loss.kind != "cross_entropy":
        yield "in place of its kind", f"for a student with another tokenizer: {_describe(settings.other_tokenizer)}"
    if settings.support_slots is not None:
        yield "support", f"the {settings.support_slots:,} likeliest slots of every position, the others in the tail"
    yield from _list_weights(settings)
    yield "optimizer", f"{settings.optimizer.kind}, {_describe(settings.optimizer)}"
    yield "schedule", _describe(settings.schedule)
    skipped = f", {skipped_steps:,} of them skipped: loss or gradient were not finite" if skipped_steps else ""
    yield "steps", f"{steps:,} of {settings.global_batch_sequences:,} sequences{skipped}"
    if settings.skip_steps:
        ranges = ", ".join(f"{start:,} to {stop - 1:,}" for start, stop in settings.skip_steps)
        yield "global batches left out", f"{ranges}, counted from 0"
    yield "tokens", f"{positions:,}"
    yield "precision", f"{settings.precision}, weights in {student.dtype}"
    order = "" if settings.order_seed is None else f", of the order of records {settings.order_seed}"
    yield "seed", f"{settings.seed}{order}"


def _list_weights(settings: TrainSettings) -> Iterator[tuple[str, str]]:
    """What teachers, corpora and documents count beside each other."""
    for number, teacher in enumerate(settings.further_teachers, start=2):
        yield f"weight of teacher {number}", str(teacher.weight)
    for number, corpus in enumerate(settings.further_corpora, start=2):
        yield f"weight of corpus {number}", str(corpus.weight)
    if settings.document_weights is not None:
        yield "weights of documents", _describe(settings.document_weights)


def _describe_evaluation(settings: TrainSettings, evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "Nothing: no records were held out of the training."
    held_out = "" if settings.held_out is None else f" ({_describe(settings.held_out)})"
    scalars = evaluation.list_scalars()
    rows = [(label, f"{scalars[figure]:.4f}", unit) for figure, label, unit in _FIGURES if figure in scalars]
    return f"On {evaluation.positions:,} positions of records that were held out of the training{held_out}.\n\n" + (
        _build_table(("figure", "value", "unit"), rows)
    )


def _list_values(settings: Settings) -> list[tuple[str, object]]:
    return [
        (name, value) for name, value in settings.model_dump(mode="json").items() if value not in (None, [], (), {})
    ]


def _describe(settings: Settings) -> str:
    """The settings that are not off, as `name value`."""
    return hide_secrets(", ".join(f"{name} {value}" for name, value in _list_values(settings)))


def _name_model(model: str) -> str:
    return hide_secrets(model)


def _build_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
