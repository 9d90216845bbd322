"""Settings of a capture on a cluster: the capture itself, and the actors it runs on."""

from __future__ import annotations

from pathlib import Path

from fsspec.core import split_protocol
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field, model_validator

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
    heartbeat_seconds: float | None = Field(default=15.0, ge=1)
    """How often the driver says in the store what it is at, for `logitstore status`; null: never."""

    @model_validator(mode="after")
    def _choose_actors(self) -> ClusterCaptureSettings:
        """An endpoint is asked by one actor, which keeps to its limits and counts what is spent; it needs no GPU."""
        if self.teacher.engine != "openai_api":
            return self
        if self.actors.count not in (None, 1):
            raise ValueError(
                f"actors.count: expected 1 actor beside engine openai_api, found {self.actors.count}; leave it out, "
                "and set teacher.openai_api.concurrency"
            )
        needs = {"count": 1, "cpus": self.actors.cpus or 1.0, "gpus": self.actors.gpus or 0.0}
        # The model is frozen for its users; this is still its making.
        object.__setattr__(self, "actors", self.actors.model_copy(update=needs))
        return self


def make_paths_absolute(settings: ClusterCaptureSettings) -> ClusterCaptureSettings:
    """The same capture for processes in any folder of this machine: local paths made absolute."""
    store, teacher = settings.store, settings.teacher
    if "::" not in store and split_protocol(store)[0] in (None, "file", "local"):
        store = str(Path(LocalFileSystem._strip_protocol(store)).absolute())
    folders = {"model": teacher.model, "tokenizer": teacher.tokenizer}
    if teacher.openai_api is not None:
        folders.pop("model")  # a name of the endpoint's
    update: dict[str, object] = {
        key: str(Path(name).absolute()) for key, name in folders.items() if name and Path(name).is_dir()
    }
    if teacher.openai_api is not None and teacher.openai_api.spool is not None:
        spool = str(Path(teacher.openai_api.spool).expanduser().absolute())
        update["openai_api"] = teacher.openai_api.model_copy(update={"spool": spool})
    return settings.model_copy(update={"store": store, "teacher": teacher.model_copy(update=update)})
