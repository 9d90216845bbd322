"""Settings of a capture on a cluster: the capture itself, and the actors it runs on."""

from __future__ import annotations

from pathlib import Path

from fsspec.core import split_protocol
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field

from logitstore.planning import CaptureSettings
from logitstore.settings import Settings


class ActorSettings(Settings):
    """The actors of a capture. Defaults: one actor per GPU where there are GPUs, one per two CPUs elsewhere."""

    count: int | None = Field(default=None, ge=1)
    cpus: float | None = Field(default=None, gt=0)
    """CPUs per actor, also the number of threads its teacher computes with."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs per actor; below 1 actors share one."""
    units_in_flight: int = Field(default=2, ge=1)
    """Units sent to an actor ahead: 2 hides the way to the driver and back."""
    tries: int = Field(default=3, ge=1)
    """Failures of a unit, other than lost machines, before it is set aside."""


class ClusterCaptureSettings(CaptureSettings):
    """`capture.yaml`."""

    actors: ActorSettings = ActorSettings()


def make_paths_absolute(settings: ClusterCaptureSettings) -> ClusterCaptureSettings:
    """The same capture for processes in any folder of this machine: local paths of store and teacher made absolute."""
    store, teacher = settings.store, settings.teacher
    if "::" not in store and split_protocol(store)[0] in (None, "file", "local"):
        store = str(Path(LocalFileSystem._strip_protocol(store)).absolute())
    folders = {"model": teacher.model, "tokenizer": teacher.tokenizer}
    found = {key: str(Path(name).absolute()) for key, name in folders.items() if name and Path(name).is_dir()}
    return settings.model_copy(update={"store": store, "teacher": teacher.model_copy(update=found)})
