"""Checkpoints: folders that are there as a whole or not at all.

    checkpoints/step-000020/checkpoint.json    what the run is, and how far it has come
                            .metadata          which tensor is where
                            __0_0.distcp       weights and optimizer state, a file per process
                            digests.json       SHA-256 of the two kinds before, held to when they are read

There is no state of random generators in them: every step seeds its own from (seed, step, rank), so a run resumes at
any step, and with any number of processes that divides the batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, NonNegativeInt, TypeAdapter

from logitstore.errors import LogitStoreError, TrainingError
from trainer.distributed import Processes
from trainer.sharded_state import find_missing, read_state, write_state

_HEADER, _DIGESTS, _METADATA = "checkpoint.json", "digests.json", ".metadata"
# Of the files beside the header. The first had all of the state in one file and did not name itself, the second no
# digests.
_FORMAT = 3


@dataclass(frozen=True, kw_only=True)
class CheckpointHeader:
    """What a checkpoint says of itself.

    Attributes:
        step: optimizer steps done, those that were skipped included.
        positions: positions that the student has been trained on, over all ranks.
        manifest_number: of the store; a run stays with the manifest it began with.
        stream: state of the record stream.
        identity: name and value of everything that must be the same in the run that goes on.
        further_manifests: of the stores of further teachers, in their order.
        corpus_manifests: of the stores of further corpora, by their URLs.
        skipped_steps: steps that were skipped because loss or gradient were not finite.
        skipped_in_a_row: those of them after the last step that was not.
        format: of the files beside the header.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", strict=True)

    step: NonNegativeInt
    positions: NonNegativeInt
    manifest_number: NonNegativeInt
    stream: dict[str, Any]
    identity: dict[str, Any]
    further_manifests: list[NonNegativeInt] = field(default_factory=list)
    corpus_manifests: dict[str, NonNegativeInt] = field(default_factory=dict)
    skipped_steps: NonNegativeInt = 0
    skipped_in_a_row: NonNegativeInt = 0
    format: int = _FORMAT


def save_checkpoint(
    folder: Path,
    header: CheckpointHeader,
    student: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    processes: Processes,
    *,
    keep: int,
) -> Path:
    """Write a checkpoint below `folder`, then delete all but the newest `keep`; every process has to come here.

    Killed at any moment, this leaves the earlier checkpoints and perhaps a temporary folder, which the next call
    clears. A checkpoint of this step that is there already is left as it is.

    Returns:
        The checkpoint's own folder.

    Raises:
        TrainingError: processes do not see the same folder, or there is state of a kind that cannot be kept.
        OutsideError: it cannot be written.
    """
    path, is_first = folder / f"step-{header.step:06d}", processes.rank == 0
    if not processes.take_from_first(int((path / _HEADER).exists())):
        try:
            _write_aside(folder, path, header, student, optimizers, processes)
        except LogitStoreError:
            if is_first:
                with suppress(OSError):
                    _clear(folder)  # a part of a checkpoint would keep a full disk full
            raise
    with processes.fail_together(folder):
        if is_first:
            for step, older in _list_checkpoints(folder)[:-keep]:
                if step < header.step:  # gone as a whole too, whatever happens while files are deleted
                    shutil.rmtree(older.replace(folder / f".{older.name}.tmp"))
    return path


def _write_aside(
    folder: Path,
    path: Path,
    header: CheckpointHeader,
    student: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    processes: Processes,
) -> None:
    is_first, temporary = processes.rank == 0, folder / f".{path.name}.tmp"
    with processes.fail_together(temporary):
        if is_first:
            _clear(folder)
            temporary.mkdir(parents=True)
    write_state(temporary, student, optimizers, processes)
    _check_all_is_there(temporary, processes)
    with processes.fail_together(temporary):
        own = [*temporary.glob(f"__{processes.rank}_*"), *([temporary / _METADATA] if is_first else [])]
        lines = [json.dumps([file.name, _compute_digest(file)]) for file in own]
    digests = dict(json.loads(line) for line in processes.join_texts(lines))
    with processes.fail_together(path):
        if is_first:
            _write_json(temporary / _DIGESTS, digests)
            _write_json(temporary / _HEADER, asdict(header))
            temporary.replace(path)


def _clear(folder: Path) -> None:
    """Delete what saving that was killed, or failed, left."""
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover)


def _check_all_is_there(folder: Path, processes: Processes) -> None:
    """Check that rank 0 sees what all ranks wrote; all of them fail together, so that none waits for another.

    Raises:
        TrainingError: names the files that it does not see.
    """
    with processes.fail_together(folder):
        found = find_missing(folder) if processes.rank == 0 else []
    if missing := processes.join_texts(found):
        raise TrainingError(
            f"{folder}: expected what all processes wrote, found no {', '.join(missing)}; give processes on several "
            "machines an output folder that they share"
        )


def _compute_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def find_latest_checkpoint(folder: Path) -> Path | None:
    """Folder of the newest complete checkpoint below `folder`, None where there is none."""
    checkpoints = _list_checkpoints(folder)
    return checkpoints[-1][1] if checkpoints else None


def agree_on_checkpoint(folder: Path, processes: Processes) -> Path | None:
    """The newest complete checkpoint that rank 0 sees, on every rank; None where there is none."""
    latest = find_latest_checkpoint(folder)
    step = processes.take_from_first(-1 if latest is None else int(latest.name.removeprefix("step-")))
    return None if step < 0 else folder / f"step-{step:06d}"


def read_header(path: Path) -> CheckpointHeader:
    """Header of the checkpoint in a folder.

    Raises:
        TrainingError: it cannot be read, or another version of this program wrote it.
    """
    try:
        data = (path / _HEADER).read_bytes()
        found = json.loads(data).get("format", 1)
        if found == _FORMAT:
            return TypeAdapter(CheckpointHeader).validate_json(data)
    except (OSError, ValueError, AttributeError) as error:
        raise TrainingError(f"{path / _HEADER}: expected a checkpoint, found {error}; {_what_to_do(path)}") from error
    raise TrainingError(
        f"{path}: expected a checkpoint of format {_FORMAT}, found one of format {found}, which another version of "
        f"logitstore wrote; finish the run with that version, or delete {path.parent} to start it anew"
    )


def load_state(
    path: Path, student: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], processes: Processes
) -> None:
    """Put a checkpoint's weights and optimizer state into a student and its optimizers; every process has to come here.

    Raises:
        TrainingError: the files are damaged, or do not fit the student.
    """
    try:
        with processes.fail_together(path):
            _check_digests(path, processes)
        read_state(path, student, optimizers, processes)
    except TrainingError as error:
        raise TrainingError(f"{error}; {_what_to_do(path)}") from error


def _check_digests(path: Path, processes: Processes) -> None:
    """Hold this process's share of the files to what was written.

    Raises:
        TrainingError: names the file that is not what it was.
    """
    try:
        digests = TypeAdapter(dict[str, str]).validate_json((path / _DIGESTS).read_bytes())
        names = sorted({_METADATA, *digests, *(file.name for file in path.glob("__*"))})
        for name in names[processes.rank :: processes.world_size]:
            written, found = digests.get(name, "(none)"), _compute_digest(path / name)
            if found != written:
                raise TrainingError(f"{path / name}: expected bytes of SHA-256 {written}, found those of {found}")
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: expected the files of a checkpoint, found {error}") from error


def check_same_run(where: str | Path, in_checkpoint: Mapping[str, Any], in_this_run: Mapping[str, Any]) -> None:
    """Check that what identifies a run is the same in a checkpoint and in this run; None is as good as nothing.

    Raises:
        TrainingError: prints both values of everything that differs, one under the other.
    """
    in_this_run = json.loads(json.dumps(in_this_run))  # as it would come back from a checkpoint
    missing = object()
    lines = []
    for key in [*in_checkpoint, *(key for key in in_this_run if key not in in_checkpoint)]:
        sides = [side.get(key, missing) for side in (in_checkpoint, in_this_run)]
        if sides[0] != sides[1] and not all(side is None or side is missing for side in sides):
            there, here = ("(nothing)" if side is missing else repr(side) for side in sides)
            lines.append(f"  {key}\n    in checkpoint: {there}\n    in this run:   {here}")
    if lines:
        raise TrainingError(
            f"{where}: belongs to a run with other settings:\n"
            + "\n".join(lines)
            + "\ngive this run an output folder of its own, or the settings of the checkpoint"
        )


def _list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints, the newest last."""
    matches = ((re.fullmatch(r"step-(\d{6,})", path.name), path) for path in folder.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in matches if match and (path / _HEADER).exists())


def _what_to_do(path: Path) -> str:
    return f"delete {path} to go on from an earlier checkpoint, or from the start"
