"""The settings of a training run.

What the store's manifest knows (vocabulary, teacher, method, codec, sequence length) is not among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from logitstore.errors import ConfigError
from logitstore.settings import Settings
from logitstore.stream.cache import CacheSettings
from logitstore.stream.scratch import ScratchSettings
from logitstore.stream.selection import HeldOut
from logitstore.stream.where import Where
from trainer.loss.settings import LossSettings
from trainer.micro_batches import MicroBatches
from trainer.optimizer_config import OptimizerSettings, ScheduleSettings
from trainer.stream_config import (
    DocumentWeightSettings,
    FurtherCorpusSettings,
    FurtherTeacherSettings,
    ManifestNumber,
    StreamSettings,
)
from trainer.student_config import FromTeacherSettings, LoraSettings
from trainer.vocabularies.settings import OtherTokenizerSettings

StepNumber = Annotated[int, Field(ge=0)]
Precision = Literal["float32", "bfloat16"]
Parallel = Literal["ddp", "fsdp"]
# Ten weights of 0.1 do not sum to 1 in floating point.
_WEIGHT_ROUNDING = 1e-9
# Sequences per forward pass of an evaluation where nothing else is said.
_EVALUATION_SEQUENCES = 8


class StudentSettings(Settings):
    """Where the student comes from: exactly one of `model`, `config` and `from_teacher`.

    Attributes:
        model: name or folder of a pretrained transformers causal LM.
        config: keys of a transformers config, with `model_type`, for a student with fresh weights. `vocab_size`,
            `bos_token_id` and `eos_token_id` are the teacher's unless given.
        from_teacher: what of the teacher the student begins as.
        lora: adapters to train instead of the student's own weights; None trains those.
        dtype: of the weights, and so of the optimizer's state. bfloat16 halves both, and loses updates smaller than
            1/256 of a weight.
    """

    model: str | None = None
    config: dict[str, Any] | None = None
    from_teacher: FromTeacherSettings | None = None
    lora: LoraSettings | None = None
    dtype: Precision = "float32"

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if [self.model, self.config, self.from_teacher].count(None) != 2:
            raise ValueError("expected exactly one of model, config and from_teacher")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config: expected a model_type, such as llama")
        if self.config is not None and self.lora is not None:
            raise ValueError("lora: expected a student with weights to stand beside, found one of fresh weights")
        return self


class TrainSettings(Settings):
    """One training run.

    Attributes:
        store: URL of the store.
        manifest: number of the manifest to read. `latest` is resolved when the run starts and stays, when it resumes.
        further_teachers: stores of other teachers that teach beside that of `store`, which is evaluated on alone.
        further_corpora: stores of other corpora whose records are mixed with those of `store`. All records of each are
            trained on, but for what of the same sequences is held out of `store`, which alone is evaluated on.
        where: which records of `store` are read, for training and evaluation; None reads all. Further corpora have
            conditions of their own.
        student, loss, optimizer, schedule: see there.
        other_tokenizer: for a student whose tokenizer is not the teacher's; what it is held to stands in the place of
            `loss.kind`. None is a student that reads the teacher's ids.
        document_weights: what positions count by source and document. The loss is weighted and still divided by the
            number of taught positions; reported distances are not weighted.
        global_batch_sequences: sequences per optimizer step, over all processes.
        support_slots: how many of the likeliest entries of every position are taught, the rest of the support going
            into the tail; None teaches all that are kept. Evaluations compare with all.
        micro_batch_sequences: sequences per forward and backward on one process; without either of the two, all of a
            step at once.
        micro_batch_tokens: positions per forward and backward on one process, padding included, sequences of similar
            length together; a longer sequence goes alone.
        pack_sequences: whether the sequences of a micro-batch go behind one another in one row, without padding. Tried
            out on the student when the run starts.
        steps: optimizer steps of the whole run.
        precision: `bfloat16` runs the student under autocast; losses are reduced in float32 either way.
        parallel: how several processes share the student; one alone has all of it. `ddp` gives each a copy. `fsdp` cuts
            weights, gradients and optimizer state among them, layer by layer, and in bfloat16 gathers weights in that.
            A run may go on with the other.
        activation_checkpointing: compute the activations of every layer again in the backward pass, instead of keeping
            them: less memory, about a third more compute, the same gradients.
        max_skipped_steps: steps in a row whose loss or gradient may be not finite. Such a step leaves the student as it
            was, and is counted and logged with its records; one more in a row ends the run. 0 ends it at the first.
        fused_loss: compute losses from hidden states and head, without logits, which takes far less memory; for a head
            that is not a plain linear one, logits are computed all the same. False always computes them.
        seed: of fresh weights, of dropout, and of the order of the records where order_seed is None.
        order_seed: of the order of the records alone: runs that differ in seed, but not in this, read the same batches.
        held_out: records that are evaluated on and not trained on.
        evaluate_every: steps between evaluations; None evaluates once, at the end.
        checkpoint_every: steps between checkpoints; None writes one only when the run is interrupted, and after its
            last step.
        keep_checkpoints: how many of the newest stay.
        log_every: steps per line of metrics.
        log_records: write the addresses of the records of every step to records-rank<r>.jsonl, and of several corpora
            the number of each one's own, the first being 0.
        skip_steps: half-open ranges of global batches, counted from 0, that are left out: to get past one that a run
            fails at. The run makes as many steps all the same.
        cache: a folder on a local disk for what was read of the stores.
        scratch: a folder on a local disk for what each process decompressed, for the epochs after the first.
        stream: how records are read ahead of the step that needs them.
        output: folder of everything the run writes. A run that finds a checkpoint there goes on from it.
        device: of torch, such as `cuda`; None takes a GPU where there is one.
        storage_options: of fsspec, for the store; better left to the environment. Never written anywhere.
    """

    store: str
    manifest: ManifestNumber = "latest"
    further_teachers: tuple[FurtherTeacherSettings, ...] = ()
    further_corpora: tuple[FurtherCorpusSettings, ...] = ()
    where: Where | None = None
    student: StudentSettings
    loss: LossSettings = LossSettings()
    other_tokenizer: OtherTokenizerSettings | None = None
    document_weights: DocumentWeightSettings | None = None
    global_batch_sequences: int = Field(gt=0)
    support_slots: int | None = Field(default=None, gt=0)
    micro_batch_sequences: int | None = Field(default=None, gt=0)
    micro_batch_tokens: int | None = Field(default=None, gt=0)
    pack_sequences: bool = False
    steps: int = Field(gt=0)
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    precision: Precision = "float32"
    parallel: Parallel = "ddp"
    activation_checkpointing: bool = False
    # A bad record or two are no reason to end a run, and weights that went astray do not come back.
    max_skipped_steps: int = Field(default=3, ge=0)
    fused_loss: bool = True
    seed: int = Field(default=0, ge=0)
    order_seed: int | None = Field(default=None, ge=0)
    held_out: HeldOut | None = None
    evaluate_every: int | None = Field(default=None, gt=0)
    checkpoint_every: int | None = Field(default=None, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0)
    log_every: int = Field(default=10, gt=0)
    log_records: bool = False
    skip_steps: tuple[tuple[StepNumber, StepNumber], ...] = ()
    cache: CacheSettings | None = None
    scratch: ScratchSettings | None = None
    stream: StreamSettings = StreamSettings()
    output: str
    device: str | None = None
    storage_options: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.evaluate_every is not None and self.held_out is None:
            raise ValueError("evaluate_every: expected held_out records to evaluate on, found none")
        if self.micro_batch_sequences is not None and self.micro_batch_tokens is not None:
            raise ValueError("micro_batch_tokens: expected this or micro_batch_sequences, found both")
        warmup_steps = self.schedule.warmup_steps
        if warmup_steps is not None and warmup_steps > self.steps:
            raise ValueError(f"schedule.warmup_steps: expected at most the {self.steps} steps, found {warmup_steps}")
        _check_weights("further_teachers", "teacher", [teacher.weight for teacher in self.further_teachers])
        _check_weights("further_corpora", "store", [corpus.weight for corpus in self.further_corpora])
        if self.further_corpora and self.further_teachers:
            raise ValueError("further_corpora: expected this or further_teachers, found both")
        if self.other_tokenizer is not None:
            _check_beside_other_tokenizer(self)
        return self

    @property
    def teacher_weights(self) -> tuple[float, ...]:
        """Of every teacher's distillation term, the first one's first; they sum to 1."""
        further = tuple(teacher.weight for teacher in self.further_teachers)
        return max(0.0, 1 - sum(further)), *further

    @property
    def corpus_weights(self) -> tuple[float, ...]:
        """Of every corpus's records, the first one's first; they sum to 1."""
        further = tuple(corpus.weight for corpus in self.further_corpora)
        return max(0.0, 1 - sum(further)), *further

    @property
    def micro_batches(self) -> MicroBatches:
        """How a rank's part of a step is cut up."""
        return MicroBatches(
            sequences=self.micro_batch_sequences, tokens=self.micro_batch_tokens, is_packed=self.pack_sequences
        )


class EvaluateSettings(Settings):
    """One evaluation of a student on a store.

    Attributes:
        store, manifest: as in `TrainSettings`.
        student: folder of a student.
        where: which records of `store` are read, as in `TrainSettings`; None reads all.
        held_out: the records to evaluate on; None evaluates on all.
        micro_batch_sequences: sequences per forward pass; without either of the two, 8.
        micro_batch_tokens: positions per forward pass, padding included, sequences of similar length together.
        precision, device, storage_options: as in `TrainSettings`.
    """

    store: str
    manifest: ManifestNumber = "latest"
    student: str
    where: Where | None = None
    held_out: HeldOut | None = None
    micro_batch_sequences: int | None = Field(default=None, gt=0)
    micro_batch_tokens: int | None = Field(default=None, gt=0)
    precision: Precision = "float32"
    device: str | None = None
    storage_options: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.micro_batch_sequences is not None and self.micro_batch_tokens is not None:
            raise ValueError("micro_batch_tokens: expected this or micro_batch_sequences, found both")
        return self

    @property
    def micro_batches(self) -> MicroBatches:
        """What goes through the student at once."""
        sequences = None if self.micro_batch_tokens else self.micro_batch_sequences or _EVALUATION_SEQUENCES
        return MicroBatches(sequences=sequences, tokens=self.micro_batch_tokens)


def check_batch_divides(settings: TrainSettings, world_size: int) -> None:
    """Check that every process gets the same number of full micro-batches in every step.

    Raises:
        ConfigError: names the two numbers that do not divide.
    """
    if settings.global_batch_sequences % world_size:
        raise ConfigError(
            f"global_batch_sequences: expected a multiple of the {world_size} processes, "
            f"found {settings.global_batch_sequences}; choose another batch or another number of processes"
        )
    sequences_per_rank = settings.global_batch_sequences // world_size
    micro_batch = settings.micro_batch_sequences
    if micro_batch is not None and sequences_per_rank % micro_batch:
        raise ConfigError(
            f"micro_batch_sequences: expected a divisor of the {sequences_per_rank} sequences that each of "
            f"{world_size} process(es) has per step, found {micro_batch}"
        )


def _check_weights(name: str, kind: str, weights: Sequence[float]) -> None:
    if sum(weights) > 1 + _WEIGHT_ROUNDING:
        raise ValueError(
            f"{name}: expected weights that leave the first {kind} the rest of 1, found {list(weights)}, which sum to "
            f"{sum(weights):g}"
        )


def _check_beside_other_tokenizer(settings: TrainSettings) -> None:
    """Refuse what speaks of the teacher's positions, of which a student with another tokenizer has none."""
    loss, kinds = settings.loss, ("bucket_kl", "cross_entropy")
    if loss.kind not in kinds or loss.temperature != 1.0 or loss.min_entropy or loss.full_weight_entropy:
        raise ValueError(
            "loss: expected no kind, temperature or entropy rule beside other_tokenizer, whose method stands in their "
            f"place, found {loss.kind!r}; leave them out, or set kind 'cross_entropy' to train on the text alone"
        )
    for name in ("further_teachers", "document_weights", "pack_sequences"):
        if getattr(settings, name):
            raise ValueError(f"{name}: cannot be had beside other_tokenizer; leave it out")
    if settings.student.from_teacher is not None:
        raise ValueError("other_tokenizer: expected a student of its own, found one cut from the teacher")
