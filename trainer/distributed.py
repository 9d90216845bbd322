"""The processes of a run: one alone, or those that torchrun or Ray Train started."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from logitstore.errors import ConfigError, LogitStoreError, TrainingError
from trainer.writing import describe_unusable_files


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those of the run."""

    rank: int
    world_size: int
    device: torch.device

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Sums of each value over all ranks, in float64; the same numbers on every rank."""
        if self.world_size == 1:
            return [float(value) for value in values]
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return [float(value) for value in sums.tolist()]

    def take_from_first(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        if self.world_size == 1:
            return number
        shared = torch.tensor(number, dtype=torch.int64, device=self.device)
        dist.broadcast(shared, src=0)
        return int(shared.item())

    def find_most(self, number: int) -> int:
        """The largest of the ranks' numbers, on every rank."""
        if self.world_size == 1:
            return number
        shared = torch.tensor(number, dtype=torch.int64, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared.item())

    def join_texts(self, texts: Sequence[str]) -> list[str]:
        """The texts of all ranks, in the order of ranks; the same on every rank."""
        if self.world_size == 1:
            return list(texts)
        gathered: list[list[str]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(gathered, list(texts))
        return [text for of_rank in gathered for text in of_rank]

    @contextmanager
    def fail_together(self, where: str | Path) -> Iterator[None]:
        """Have every rank fail with the same error where one does, which the others would else wait for.

        Every rank has to come here, and nothing in the block may wait for other ranks. The error is that of the lowest
        rank that has one.

        Args:
            where: the block is at work, for what memory or disk have to say.

        Raises:
            LogitStoreError: as in the block of some rank.
            TrainingError: a rank's memory is too small.
            OutsideError: a rank's files cannot be read or written.
        """
        failure: LogitStoreError | None = None
        try:
            yield
        except (LogitStoreError, torch.OutOfMemoryError, OSError) as error:
            failure = self._describe_failure(where, error)
            failure.__cause__ = None if error is failure else error
        failures: list[LogitStoreError | None] = [failure]
        if self.world_size > 1:
            failures = [None] * self.world_size
            dist.all_gather_object(failures, failure)
        for rank, found in enumerate(failures):
            if found is not None:
                raise failure if failure is not None and rank == self.rank else found

    def _describe_failure(self, where: str | Path, error: Exception) -> LogitStoreError:
        if isinstance(error, LogitStoreError):
            return error
        if isinstance(error, torch.OutOfMemoryError):
            return TrainingError(
                f"{where}: expected room in the memory of {self.device}, found {error}; take a smaller student, cut it "
                "among more processes with parallel: fsdp, or have fewer runs side by side"
            )
        return describe_unusable_files(where, error)

    def wait_for_all(self) -> None:
        """Return when every rank has come here."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def join_processes(device: str | None = None) -> Iterator[Processes]:
    """Join the process group that the environment describes, and leave it at the end.

    A group that is open already (Ray Train opens one) is used and left open. Without one, and without the
    environment of torchrun, this process is the whole run.

    Args:
        device: of torch; None takes a GPU where there is one, one per process.

    Raises:
        ConfigError: torch does not know the device, or does not see it.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if dist.is_initialized():
        yield Processes(rank=dist.get_rank(), world_size=dist.get_world_size(), device=chosen)
    elif world_size == 1:
        yield Processes(rank=0, world_size=1, device=chosen)
    else:
        if chosen.type == "cuda":
            dist.init_process_group("nccl", device_id=chosen)
        else:
            dist.init_process_group("gloo")
        try:
            yield Processes(rank=dist.get_rank(), world_size=world_size, device=chosen)
        finally:
            dist.destroy_process_group()


def choose_device(device: str | None, *, local_rank: int = 0) -> torch.device:
    """The device named, or a GPU where there is one; a bare `cuda` means the GPU of this process on its machine.

    Raises:
        ConfigError: torch does not know the device, or does not see it.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device: expected a device of torch such as 'cpu' or 'cuda', found {device!r}") from error
    if chosen.type != "cuda":
        return chosen
    chosen = torch.device("cuda", local_rank if chosen.index is None else chosen.index)
    if chosen.index is None or chosen.index >= torch.cuda.device_count():
        raise ConfigError(
            f"device: expected one of the {torch.cuda.device_count()} GPU(s) that torch sees, found {str(chosen)!r}"
        )
    return chosen
