"""Weights and optimizer state as files that every process writes and reads its part of.

Each tensor is kept under a name of its own, whole or cut, by torch.distributed.checkpoint: so a checkpoint of one
number of processes, and of copies or parts of a student, is read by any other. Settings of the optimizer are not in
it; a run has them in its own settings.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from logitstore.errors import OutsideError, TrainingError
from trainer.distributed import Processes

_STUDENT, _OPTIMIZER, _NUMBER = "student.", "optimizer.", "number."
# Whose state a tensor is put into, for which of its parameters, and its key there.
_State = tuple[torch.optim.Optimizer, torch.nn.Parameter, str, torch.Tensor]


def write_state(
    folder: Path, student: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], processes: Processes
) -> None:
    """Write this process's part of the state into an empty folder; every process has to come here.

    Args:
        folder: that all processes see.
        student: of which other processes have a copy, or other parts.
        optimizers: of its parameters.
        processes: that have the parts.

    Raises:
        TrainingError: there is state of a kind that cannot be kept.
        OutsideError: it cannot be written.
    """
    is_alone = processes.world_size == 1
    with processes.fail_together(folder):
        tensors = {**_list_weights(student), **_list_optimizer_state(student, optimizers)}
    try:
        _run_together(is_alone, lambda: save(tensors, checkpoint_id=folder, no_dist=is_alone))
    except _TogetherError as error:
        raise OutsideError(
            f"{folder}: expected to write a checkpoint, found {error}; look to room and permissions, and run the same "
            "command again: it goes on from the newest checkpoint"
        ) from error


def read_state(
    folder: Path, student: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], processes: Processes
) -> None:
    """Put what `write_state` wrote into a student and its optimizers, in place; every process has to come here.

    Raises:
        TrainingError: the files are damaged, or do not fit the student.
    """
    is_alone = processes.world_size == 1
    with processes.fail_together(folder):
        weights, states = _plan_reading(folder, student, optimizers)
    tensors = {**weights, **{name: tensor for name, (*_, tensor) in states.items()}}
    try:
        _run_together(is_alone, lambda: load(tensors, checkpoint_id=folder, no_dist=is_alone))
    except _TogetherError as error:
        raise TrainingError(f"{folder}: {error}") from error
    for optimizer in optimizers:
        optimizer.state.clear()
    for name, (optimizer, parameter, key, tensor) in states.items():
        state = optimizer.state.setdefault(parameter, {})
        state[key] = tensor.item() if name.startswith(_NUMBER) else tensor


def _plan_reading(
    folder: Path, student: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[dict[str, torch.Tensor], dict[str, _State]]:
    """What a checkpoint is read into: the student's weights, and empty tensors for the state of optimizers."""
    try:
        saved = _list_saved(_read_metadata(folder))
    except Exception as error:  # a damaged pickle may name modules that there are not, and anything else
        raise TrainingError(f"{folder}: cannot be read: {type(error).__name__}: {error}") from error
    weights = _list_weights(student)
    _check_names(folder, weights, {name for name in saved if name.startswith(_STUDENT)})
    states = _allocate_optimizer_state(student, optimizers, saved)
    if unknown := sorted(saved.keys() - weights.keys() - states.keys()):
        raise TrainingError(f"{folder}: expected state of the student's own weights, found {', '.join(unknown[:5])}")
    return weights, states


def find_missing(folder: Path) -> list[str]:
    """Names of files that processes have written by the list of all files, and that this one does not see."""
    names = {entry.relative_path for entry in _read_metadata(folder).storage_data.values()}
    return sorted(name for name in names if not (folder / name).exists())


def _list_weights(student: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, sharing memory with the student; a tied one once."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, value in student.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor):
            found.setdefault(id(value), (_STUDENT + name, value.detach()))
    return dict(found.values())


def _list_optimizer_state(
    student: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, torch.Tensor]:
    """State by the names of parameters; a parameter that never had a gradient has none."""
    found = {}
    for name, parameter, optimizer in _list_optimized(student, optimizers):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                is_whole = not isinstance(value, DTensor) and value.ndim > 0
                if isinstance(parameter, DTensor) and is_whole:
                    raise TrainingError(
                        f"checkpoint: expected state that is cut as the weights are, found that "
                        f"{type(optimizer).__name__} has another under {key!r}; use parallel: ddp, or another optimizer"
                    )
                found[f"{_OPTIMIZER}{name}.{key}"] = value.detach()
            elif isinstance(value, int | float):
                # As exact as Python's own; a float would become one of 32 bits.
                dtype = torch.float64 if isinstance(value, float) else None
                found[f"{_NUMBER}{name}.{key}"] = torch.tensor(value, dtype=dtype)
            else:
                raise TrainingError(
                    f"checkpoint: expected tensors and numbers in the state of {type(optimizer).__name__}, found "
                    f"{type(value).__name__} under {key!r}; use another optimizer"
                )
    return found


def _allocate_optimizer_state(
    student: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], saved: dict[str, TensorStorageMetadata]
) -> dict[str, _State]:
    """Empty tensors for what was saved, by name: whose state each goes into, its key there, and the tensor."""
    owners = {name: (parameter, optimizer) for name, parameter, optimizer in _list_optimized(student, optimizers)}
    found = {}
    for name, entry in saved.items():
        of_parameter, _, key = name.removeprefix(_OPTIMIZER).removeprefix(_NUMBER).rpartition(".")
        if name.startswith(_STUDENT) or of_parameter not in owners:
            continue
        parameter, optimizer = owners[of_parameter]
        dtype = entry.properties.dtype
        if entry.size == parameter.shape and not name.startswith(_NUMBER):
            tensor = torch.empty_like(parameter.detach(), dtype=dtype)
        else:
            is_number = name.startswith(_NUMBER)
            is_on_cpu = is_number or (not entry.size and not _keeps_steps_on_device(optimizer, parameter))
            tensor = torch.empty(entry.size, dtype=dtype, device="cpu" if is_on_cpu else parameter.device)
        found[name] = (optimizer, parameter, key, tensor)
    return found


def _list_optimized(
    student: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> Iterator[tuple[str, torch.nn.Parameter, torch.optim.Optimizer]]:
    """Name, parameter, and the optimizer that moves it."""
    owners = {
        id(parameter): optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in student.named_parameters():
        if id(parameter) in owners:
            yield name, parameter, owners[id(parameter)]


def _keeps_steps_on_device(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> bool:
    """Whether the count of steps is where the parameter is, as torch's own optimizers decide it."""
    for group in optimizer.param_groups:
        if any(parameter is other for other in group["params"]):
            return bool(group.get("fused") or group.get("capturable"))
    return False


def _read_metadata(folder: Path) -> Metadata:
    return FileSystemReader(folder).read_metadata()


def _list_saved(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    entries = metadata.state_dict_metadata.items()
    return {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


def _check_names(folder: Path, weights: dict[str, torch.Tensor], saved: set[str]) -> None:
    if weights.keys() != saved:
        raise TrainingError(
            f"{folder}: expected the weights of this student, found others\n"
            f"  only in checkpoint: {', '.join(sorted(saved - weights.keys())) or '(none)'}\n"
            f"  only in student:    {', '.join(sorted(weights.keys() - saved)) or '(none)'}"
        )


class _TogetherError(Exception):
    """What some process could not do, on every process."""


def _run_together(is_alone: bool, work: Callable[[], object]) -> None:
    """Run a collective of torch.distributed.checkpoint, whose failures come from any process.

    Raises:
        _TogetherError: the same on every process.
    """
    try:
        with warnings.catch_warnings():
            if is_alone:
                warnings.filterwarnings("ignore", message="torch.distributed is")
            work()
    except CheckpointException as error:
        failure = next(iter(error.failures.values()))[0]
        if not isinstance(failure, Exception):
            raise failure from error  # Ctrl-C
        raise _TogetherError(f"{type(failure).__name__}: {failure}") from error
