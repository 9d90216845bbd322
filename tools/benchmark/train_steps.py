"""What `logitstore benchmark train` measures: steps of a run that reads a store, and plain steps on the same tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from logitstore.records import Record
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from tools.benchmark.loss_methods import ChunkedCrossEntropy
from tools.benchmark.stream_records import vary_records, write_arrays, write_store
from tools.benchmark.synthetic_teacher import build_synthetic_records
from trainer.config import TrainSettings
from trainer.distributed import join_processes
from trainer.loop import take_step
from trainer.loss.sparse_linear import choose_tile_bytes
from trainer.run import Run, prepare_run
from trainer.sweep.feed import SharedFeed

_HEAD_WIDTH = 64
# So few that a batch needs no row group of another one: all but the first batch is decoded while the clock runs.
_RECORDS_PER_ROW_GROUP = 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained on what. `layers` are the student's, `sequences` those of a step, all of one length."""

    store: str
    vocab_size: int
    length: int
    sequences: int
    micro_batch_sequences: int
    hidden_size: int
    layers: int
    steps: int
    loss: str = "bucket_kl"
    precision: str = "float32"
    device: str | None = None

    @property
    def positions(self) -> int:
        """Of a step."""
        return self.sequences * self.length

    @property
    def student(self) -> dict[str, Any]:
        """Config of a Llama with tied embeddings."""
        heads = max(1, self.hidden_size // _HEAD_WIDTH)
        return {
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": round(self.hidden_size * 8 / 3),
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": self.length,
            "tie_word_embeddings": True,
        }


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A timed step.

    Attributes:
        seconds: from asking for its batch on; of the first step, from having it on.
        wait_seconds: of these, that the loop has waited for records and micro-batches.
        first_seconds: of the first step, until its batch was there.
    """

    seconds: float
    wait_seconds: float = 0.0
    first_seconds: float = 0.0


Take = Callable[[], Measured]


def _time_steps(
    device: torch.device, read: Callable[[], Any], work: Callable[[Any], object], waited: Callable[[], float]
) -> Take:
    """Function that makes a step and times it; on a GPU, what was asked for is waited for.

    What a stream reads ahead it begins with when a batch is taken from it, and so in the time of its own steps.
    """
    is_first = True

    def find_time() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def take() -> Measured:
        nonlocal is_first
        started, waited_before, first_seconds = find_time(), waited(), 0.0
        batch = read()
        if is_first:
            started, waited_before, is_first = find_time(), waited(), False
            first_seconds = waited_before
        work(batch)
        seconds = find_time() - started
        return Measured(seconds=seconds, wait_seconds=waited() - waited_before, first_seconds=first_seconds)

    return take


def write_train_store(folder: Path, *, num_records: int, length: int, top_k: int, vocab_size: int) -> str:
    """A store of so many records of the synthetic teacher's variations; its URL.

    Every record is a row group, so that reading goes on while the student is trained: of larger ones, the first batch
    takes from all that a small store has.
    """
    [base] = build_synthetic_records(1, top_k, vocab_size=vocab_size)
    records = vary_records([cut_positions(base, length)], num_records, vocab_size=vocab_size)
    write_arrays(folder / "arrays", records, num_records)
    files = StoreFiles(str(folder / "store"))
    position_bytes = 17 + 8 * top_k  # before compression, as a writer counts
    row_group = {"row_group_bytes": _RECORDS_PER_ROW_GROUP * length * position_bytes}
    write_store(files, folder / "arrays", vocab_size, row_group)
    return files.url


def cut_positions(record: Record, length: int) -> Record:
    """The first positions of a record whose supports are all equally long."""
    signal, top_k = record.signal, int(record.signal.support_counts[0])
    columns = {
        name: getattr(signal, name)[:length]
        for name in ("support_counts", "tail_logprob", "entropy", "next_token_logprob")
    }
    entries = {name: getattr(signal, name)[: length * top_k] for name in ("support_ids", "support_logprobs")}
    return replace(
        record,
        token_ids=record.token_ids[: length + 1],
        loss_mask=record.loss_mask[:length],
        signal=replace(signal, **columns, **entries),
    )


@contextmanager
def opened_run(case: Case, loss: str) -> Iterator[Run]:
    """A run at its first step, with a step behind it that no figure counts."""
    with TemporaryDirectory(prefix="logitstore-train-") as output, join_processes(case.device) as processes:
        settings = TrainSettings.model_validate(
            {
                "store": case.store,
                "student": {"config": case.student},
                "loss": {"kind": loss},
                "global_batch_sequences": case.sequences,
                "micro_batch_sequences": case.micro_batch_sequences,
                "precision": case.precision,
                "steps": case.steps + 1,
                "output": output,
                "device": case.device,
            }
        )
        run = prepare_run(settings, processes)
        try:
            take_step(run, run.prepare(_read_some(run.store, case.micro_batch_sequences)))
            yield run
        finally:
            run.close()


def _read_some(store: LogitStore, num_records: int) -> Any:
    batch = store.read_row_group(0)
    return batch.slice(0, min(num_records, len(batch)))


@contextmanager
def opened_distillation(case: Case, loss: str | None = None) -> Iterator[Take]:
    """Steps of `logitstore train`, stream and all; the loss is the case's unless another is named."""
    with opened_run(case, loss or case.loss) as run:
        feed = run.feed
        yield _time_steps(
            run.processes.device,
            read=lambda: next(feed),
            work=lambda prepared: take_step(run, prepared),
            waited=lambda: feed.data_wait_seconds,
        )


@contextmanager
def opened_side_by_side(cases: Sequence[Case]) -> Iterator[Take]:
    """Steps of several students that share a stream, as a sweep makes them."""
    with _opened_runs(cases) as runs:
        shared = SharedFeed(runs)

        def read() -> None:
            due = shared.find_due(shared.feeds)
            assert len(due) == len(runs)
            shared.feeds[0].begin_turn()
            shared.advance(due)

        def work(_: None) -> None:
            for number, (run, feed) in enumerate(zip(runs, shared.feeds, strict=True)):
                if number:
                    feed.begin_turn()
                take_step(run, next(run.feed))
                feed.end_turn()

        try:
            yield _time_steps(runs[0].processes.device, read, work, waited=lambda: sum_waits(runs))
        finally:
            shared.close()


def sum_waits(runs: Sequence[Run]) -> float:
    """Seconds that runs have waited for their feeds, together."""
    return sum(run.feed.data_wait_seconds for run in runs)


@contextmanager
def _opened_runs(cases: Sequence[Case]) -> Iterator[list[Run]]:
    with ExitStack() as stack:
        yield [stack.enter_context(opened_run(case, case.loss)) for case in cases]


@contextmanager
def opened_plain(case: Case, is_chunked: bool) -> Iterator[Take]:
    """Steps of a language model on tokens in memory: the same student, optimizer and micro-batches, no store."""
    with opened_run(case, "cross_entropy") as run:  # only its student and optimizer are used
        run.feed.close()
        device = run.processes.device
        batches = read_tokens(run.store, case.steps * case.sequences).to(device).split(case.sequences)
        take_plain_step(run, batches[0][: case.micro_batch_sequences], case, is_chunked=is_chunked)
        waiting = iter(batches)
        yield _time_steps(
            device,
            read=lambda: next(waiting),
            work=lambda token_ids: take_plain_step(run, token_ids, case, is_chunked=is_chunked),
            waited=lambda: 0.0,
        )


def read_tokens(store: LogitStore, num_records: int) -> torch.Tensor:
    """[R, T + 1] int64, token ids of the first records, which are equally long."""
    rows = [store[index].token_ids for index in range(num_records)]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def take_plain_step(run: Run, token_ids: torch.Tensor, case: Case, *, is_chunked: bool) -> float:
    """One optimizer step on [B, T + 1] tokens, as a loop that knows of no teacher makes it; the loss."""
    compute, losses = compute_chunked_loss if is_chunked else compute_dense_loss, []
    for part in token_ids.split(case.micro_batch_sequences):
        with torch.autocast(part.device.type, torch.bfloat16, enabled=case.precision == "bfloat16"):
            loss = compute(run.student, part)
        loss.backward()
        losses.append(loss.detach())
    mean = float(torch.stack(losses).mean())
    torch.nn.utils.clip_grad_norm_(run.student.parameters(), run.settings.optimizer.gradient_clip or float("inf"))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return mean


def compute_dense_loss(student: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of torch over all logits."""
    logits = student(input_ids=token_ids[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), token_ids[:, 1:].flatten())


def compute_chunked_loss(student: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """The same from hidden states and head, in the tiles of the fused loss, written for this loss alone; on CPUs."""
    hidden = student.base_model(input_ids=token_ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
    weight = student.get_output_embeddings().weight
    loss: torch.Tensor = ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight.to(hidden.dtype), token_ids[:, 1:].flatten(), choose_tile_bytes(weight)
    )
    return loss


def count_parameters(case: Case) -> int:
    """Of the student."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**case.student, vocab_size=case.vocab_size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())
