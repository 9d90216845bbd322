"""Settings of a capture on a cluster: the capture itself, and the actors it runs on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from fsspec.core import split_protocol
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field, model_validator

from logitstore.planning import CaptureSettings
from logitstore.settings import Settings
from logitstore.teacher.protocol import TeacherSettings, VllmSettings


class ActorTeacherSettings(Settings):
    """What some actors run the teacher with instead of what `teacher` says: nothing that changes what it says.

    Attributes: as of `TeacherSettings`.
    """

    device: Literal["auto", "cpu", "cuda"] | None = None
    batch_tokens: int | None = Field(default=None, ge=1)
    head_chunk_positions: int | None = Field(default=None, ge=1)
    vllm: VllmSettings | None = None


class ActorGroupSettings(Settings):
    """Actors that are alike. Defaults: one actor per GPU where there are GPUs, one per two CPUs elsewhere."""

    count: int | None = Field(default=None, ge=1)
    """Actors asked for, which tells a cluster that grows how far to; by default as many as its machines have room
    for, and more when machines join."""
    max: int | None = Field(default=None, ge=1)
    """The most actors, where there is no count. There are never more than units to capture."""
    cpus: float | None = Field(default=None, gt=0)
    """CPUs per actor, also the number of threads its teacher computes with."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs per actor; below 1 actors share one. To be set where machines with GPUs have yet to join."""
    resources: dict[str, float] | None = None
    """Resources of Ray's by any other name, per actor."""
    labels: dict[str, str] | None = None
    """Labels that an actor's machine must have, such as `ray.io/accelerator-type: H100`."""
    teacher: ActorTeacherSettings = ActorTeacherSettings()

    @model_validator(mode="after")
    def _check_bounds(self) -> ActorGroupSettings:
        if self.count is not None and self.max is not None:
            raise ValueError(
                f"expected count or max, found both ({self.count} and {self.max}); a count is asked for at once, max "
                "bounds what machines have room for"
            )
        if any(amount <= 0 for amount in (self.resources or {}).values()):
            raise ValueError(
                f"resources: expected amounts above 0, found {self.resources}; leave out what is not needed"
            )
        return self


class ActorSettings(ActorGroupSettings):
    """The actors of a capture: alike, or in `groups`, for which what is said here is the default."""

    groups: tuple[ActorGroupSettings, ...] = ()
    """Kinds of actors, for machines of several kinds. Machines that suit several go to the first."""
    units_in_flight: int = Field(default=2, ge=1)
    """Units sent to an actor ahead: 2 hides the way to the driver and back."""
    tries: int = Field(default=3, ge=1)
    """Failures of a unit, other than lost machines, before it is set aside."""
    unit_seconds: Annotated[float, Field(gt=0)] | Literal["auto"] | None = "auto"
    """Seconds after which an actor that is at a unit is taken to hang. By itself: ten times what the slowest unit took,
    ten minutes at least, six hours for the first; null: never, as beside an endpoint."""
    load_seconds: float | None = Field(default=21600.0, gt=0)
    """Seconds after which an actor that still loads the teacher ends itself, to be started again; null: never."""
    notice: Literal["aws", "azure", "gcp"] | None = None
    """The cloud that tells its machines some time before it takes them away; actors there watch for it."""

    @model_validator(mode="after")
    def _check_groups(self) -> ActorSettings:
        if self.groups and (self.count is not None or self.max is not None):
            raise ValueError(
                f"groups: expected count and max in each of the {len(self.groups)} groups, found one beside them; move "
                "it into a group"
            )
        return self

    def list_groups(self) -> list[ActorGroupSettings]:
        """All groups, with what they leave to the defaults filled in; the actors themselves where there are none."""
        own = {name: getattr(self, name) for name in ActorGroupSettings.model_fields if name in self.model_fields_set}
        if not self.groups:
            return [ActorGroupSettings.model_validate(own)]
        groups = ({name: getattr(group, name) for name in group.model_fields_set} for group in self.groups)
        return [ActorGroupSettings.model_validate(own | group) for group in groups]


class ClusterCaptureSettings(CaptureSettings):
    """`capture.yaml`."""

    actors: ActorSettings = ActorSettings()
    heartbeat_seconds: float | None = Field(default=15.0, ge=1)
    """How often the driver says in the store what it is at, for `logitstore status`; null: never."""

    def build_teacher(self, group: ActorGroupSettings) -> TeacherSettings:
        """The teacher as a group's actors run it."""
        given = group.teacher.model_dump(exclude_none=True)
        return (
            TeacherSettings.model_validate(self.teacher.model_dump(exclude_unset=True) | given)
            if given
            else self.teacher
        )

    @model_validator(mode="after")
    def _check_teachers(self) -> ClusterCaptureSettings:
        for group in self.actors.list_groups():
            self.build_teacher(group)
        return self

    @model_validator(mode="after")
    def _choose_actors(self) -> ClusterCaptureSettings:
        """An endpoint is asked by one actor, which keeps to its limits and counts what is spent; it needs no GPU."""
        if self.teacher.engine != "openai_api":
            return self
        if self.actors.groups:
            raise ValueError("actors.groups: expected 1 actor beside engine openai_api, found groups; leave them out")
        if self.actors.count not in (None, 1):
            raise ValueError(
                f"actors.count: expected 1 actor beside engine openai_api, found {self.actors.count}; leave it out, "
                "and set teacher.openai_api.concurrency"
            )
        needs: dict[str, Any] = {
            "count": 1,
            "max": None,
            "cpus": self.actors.cpus or 1.0,
            "gpus": self.actors.gpus or 0.0,
        }
        if "unit_seconds" not in self.actors.model_fields_set:
            needs["unit_seconds"] = None
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
