"""Distillation from a record stream inside Trainer of transformers, and inside what is derived from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainingArguments

from logitstore.errors import ConfigError
from logitstore.records import RecordBatch
from logitstore.store.logit_store import LogitStore
from logitstore.stream.iterator import RecordStream
from trainer.batch import TrainBatch
from trainer.data import collate as collate_records
from trainer.loss.settings import LossSettings
from trainer.optimizer import compute_distillation_weight
from trainer.optimizer_config import ScheduleSettings
from trainer.stores import check_loss_fits_stores
from trainer.streamed_batches import StreamedBatches, StreamPosition
from trainer.student import check_student_fits
from trainer.taught_student import TaughtStudent

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object  # what it is mixed into is its base


class DistillationMixin(_Base):
    """Teaches a student from a record stream inside a trainer that is derived from that of transformers.

    It goes before that trainer among the bases, as in `class Distilling(DistillationMixin, SFTTrainer): pass`.

    What it does otherwise than the trainer alone:

    - Batches are the stream's, read ahead and laid out by threads; data sets, collators and loaders of the trainer are
      not asked. `gradient_accumulation_steps` cuts a rank's part of a step into as many micro-batches.
      `per_device_train_batch_size` is set to what comes of that.
    - The loss is computed from hidden states and head where that is the same (`TaughtStudent`), and divided by the
      taught positions of all micro-batches of all processes, so the gradient is that of the mean over the positions of
      the global batch however they are spread.
    - Checkpoints hold the stream's position as of the steps done, and training goes on there at once, on any number of
      processes that divides the batch.
    - Logs tell the distances from teacher and text, `bucket_kl` and `cross_entropy`, beside the loss.

    An evaluation on the trainer's own evaluation data stays what it is.
    """

    loss_is_scaled_for_ga: bool | None = True  # divided by the positions of all accumulated batches

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        stream: RecordStream,
        loss: LossSettings | None = None,
        schedule: ScheduleSettings | None = None,
        collate: Callable[[RecordBatch], TrainBatch] = collate_records,
        fused_loss: bool = True,
        **options: Any,
    ) -> None:
        """Prepare the trainer, and check that student, stream and loss go together.

        Args:
            model: the student, as the trainer takes it.
            args: of the trainer, with `max_steps`.
            stream: of this process's rank; it stays where it is, training reads from a copy.
            loss: kind, options, weight and how the weight moves; None is the default of `LossSettings`.
            schedule: warm-up and decay of a `loss.weight_schedule` other than constant; None is the default.
            collate: a micro-batch into tensors on the CPU, called in a thread; see `collate_signals` for several
                teachers.
            fused_loss: False computes losses from logits, whatever the head is.
            options: further arguments of the trainer.

        Raises:
            ConfigError: stream, arguments and loss do not fit together.
            IncompatibleStoreError: the student cannot learn from the stream's stores.
        """
        stores = [store for source in stream.sources for store in source.stores]
        self._loss, self._schedule = loss or LossSettings(), schedule or ScheduleSettings()
        check_loss_fits_stores(self._loss, stores)
        args.per_device_train_batch_size = _check_arguments(args, stream)
        args.ignore_data_skip = True  # the stream goes there at once, instead of reading all that was read before
        self._batches = StreamedBatches(
            stream,
            steps=args.max_steps,
            num_parts=args.gradient_accumulation_steps,
            collate=collate,
            device=args.device,
        )
        position = StreamPosition(self._batches)
        options["callbacks"] = [*(options.get("callbacks") or ()), position]
        super().__init__(model, args, train_dataset=_build_stand_in(type(self)), **options)
        if not hasattr(Trainer, "loss_is_scaled_for_ga"):  # how transformers before 5.19 is told the same
            self.model_accepts_loss_kwargs = True
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"trainer: expected one GPU per process, found {self.args.n_gpu} in one; start it with torchrun"
            )
        self._taught = _build_taught_student(self, stores, self._loss, is_fused=fused_loss)
        # Of bucket KL and cross-entropy over the taught positions since the last line of the log, and their number.
        self._sums = torch.zeros(3, dtype=torch.float32, device=self.args.device)

    @property
    def is_fused(self) -> bool:
        """Whether losses are computed without logits."""
        return self._taught.is_fused

    def get_train_dataloader(self) -> Any:
        """The stream's micro-batches."""
        return self._batches

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step on this rank, and the taught positions of the step on all ranks."""
        items = [next(epoch_iterator) for _ in range(num_batches)]
        taught = torch.stack([item["batch"].loss_mask.sum() for item in items]).sum().to(device)
        return items, self.accelerator.reduce(taught, reduction="sum").clamp(min=1)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's part of the step's loss, times the number of processes, whose mean is taken."""
        batch = inputs.get("batch")
        if not isinstance(batch, TrainBatch):  # of an evaluation
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        weight = compute_distillation_weight(self.state.global_step, self.state.max_steps, self._loss, self._schedule)

        def run(batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            losses = self._taught(batch, weight)
            return losses.total, losses.bucket_kl, losses.cross_entropy

        with _forward_replaced(self.accelerator.unwrap_model(model), run):
            total, bucket_kl, cross_entropy = model(batch)
        self._sums += torch.stack([bucket_kl, cross_entropy, batch.loss_mask.sum()]).to(self._sums)
        loss = total * self.accelerator.num_processes / num_items_in_batch
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the distances from teacher and text since the last line where it is one of training."""
        if "loss" in logs:
            kl, text, taught = self.accelerator.reduce(self._sums, reduction="sum").tolist()
            logs = {**logs, "bucket_kl": kl / max(taught, 1.0), "cross_entropy": text / max(taught, 1.0)}
            self._sums = torch.zeros_like(self._sums)
        super().log(logs, start_time)


class DistillationTrainer(DistillationMixin, Trainer):
    """Trainer of transformers, taught from a record stream."""


def _check_arguments(args: TrainingArguments, stream: RecordStream) -> int:
    """Records of a micro-batch.

    Raises:
        ConfigError: the stream is not this process's, or does not divide into the micro-batches asked for.
    """
    if (stream.rank, stream.world_size) != (args.process_index, args.world_size):
        raise ConfigError(
            "stream: expected the stream of this process\n"
            f"  stream:  rank {stream.rank} of {stream.world_size}\n"
            f"  process: rank {args.process_index} of {args.world_size}\n"
            "pass rank=args.process_index and world_size=args.world_size to it"
        )
    if args.max_steps <= 0:
        raise ConfigError(
            f"max_steps: expected a number of steps, found {args.max_steps}: a stream has no end; its records once are "
            f"{stream.steps_per_epoch} steps"
        )
    if args.fp16:
        raise ConfigError("fp16: expected bf16=True or neither, found fp16=True, which losses are not computed in")
    records, parts = stream.global_batch_sequences // stream.world_size, args.gradient_accumulation_steps
    if records % parts:
        raise ConfigError(
            f"gradient_accumulation_steps: expected a divisor of the {records} sequences that each of "
            f"{stream.world_size} process(es) has per step, found {parts}"
        )
    return records // parts


def _build_stand_in(trainer: type) -> Any:
    """What SFTTrainer prepares and looks into in place of the stream; None for a trainer that asks for nothing."""
    if all(base.__module__.partition(".")[0] != "trl" for base in trainer.__mro__):
        return None
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [[0, 0]], "labels": [[0, 0]]})


def _build_taught_student(
    trainer: Trainer, stores: Sequence[LogitStore], loss: LossSettings, *, is_fused: bool
) -> TaughtStudent:
    """The student with its loss; of a student with adapters, the model that they are in."""
    student: Any = trainer.model
    if hasattr(student, "get_base_model"):
        student = student.get_base_model()
    for store in stores:
        check_student_fits(student, store)
    return TaughtStudent(
        student,
        loss,
        vocab_size=stores[0].plan.teacher.vocab_size,
        precision="bfloat16" if trainer.accelerator.mixed_precision == "bf16" else "float32",
        is_fused=is_fused,
    )


@contextmanager
def _forward_replaced(module: torch.nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """Let the next call of a module, or of what wraps it, run something else.

    Wrappers prepare, and exchange gradients of, what runs inside their forward pass only.
    """
    own = vars(module).get("forward")

    def restore() -> None:
        vars(module).pop("forward", None)
        if own is not None:
            module.forward = own

    def run_once(*inputs: Any) -> Any:
        restore()  # for what runs the module itself
        return run(*inputs)

    module.forward = run_once
    try:
        yield
    finally:
        restore()
