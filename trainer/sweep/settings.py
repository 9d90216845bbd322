"""The sweep file: settings that all runs have in common, and in what they differ."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, model_validator

from logitstore.errors import ConfigError
from logitstore.settings import Settings, build_settings, read_settings
from logitstore.url_secrets import hide_secrets
from trainer.config import TrainSettings

Section = dict[str, Any]
RESULT_FILES = ("sweep.json", "sweep.csv", "sweep.svg")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
# What has an axis of its own, and the key of train.yaml that it sets.
_AXIS_OF_KEY = {"student": "students", "loss": "losses", "seed": "seeds"}


class SweepRunSettings(Settings):
    """One run of an explicit list: its name, and settings that are merged into the common ones.

    `student` and `loss` may be names among `students` and `losses`.
    """

    model_config = ConfigDict(extra="allow")

    name: str


class SweepFile(Settings):
    """`sweep.yaml`. Every other key is one of `train.yaml`, and common to all runs.

    Attributes:
        train: a train.yaml to start from; relative paths begin at the sweep file.
        students, losses: by name, whole sections `student` and `loss` of a run.
        seeds: of fresh weights and dropout. All runs read the records in one order, that of `order_seed`, unless
            that is null: then a seed is one of the order, too.
        axes: further ways in which runs differ: of each axis by name the settings that are merged into the common ones.
        runs: a list of runs in place of all combinations of students, losses, seeds and axes.
        runs_at_once: how many runs at most are trained side by side; None trains all that share a stream.
        output: folder of the sweep; every run has a folder of its own in it.
    """

    model_config = ConfigDict(extra="allow")

    train: str | None = None
    students: dict[str, Section] = Field(default_factory=dict)
    losses: dict[str, Section] = Field(default_factory=dict)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = ()
    axes: dict[str, dict[str, Section]] = Field(default_factory=dict)
    runs: tuple[SweepRunSettings, ...] = ()
    runs_at_once: int | None = Field(default=None, gt=0)
    output: str

    @model_validator(mode="after")
    def _check_runs(self) -> Self:
        if self.runs and (self.seeds or self.axes):
            raise ValueError("runs: expected this or seeds and axes, found both; give every run its own seed")
        if not (self.runs or self.students or self.losses or self.seeds or self.axes):
            raise ValueError("expected students, losses, seeds, axes or runs, found nothing for runs to differ in")
        if empty := [name for name, values in self.axes.items() if not values]:
            raise ValueError(f"axes: expected settings by name, found none of {', '.join(empty)}")
        if reserved := sorted(self.axes.keys() & _AXIS_OF_KEY.keys()):
            raise ValueError(f"axes: expected other names than {', '.join(reserved)}: these have axes of their own")
        return self


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: of the run, and of its folder.
        labels: in what it differs from others: the name of an axis to that of the run's value.
        settings: of the run, as `logitstore train` takes them.
    """

    name: str
    labels: Mapping[str, str]
    settings: TrainSettings


@dataclass(frozen=True, kw_only=True, eq=False)
class Sweep:
    """A sweep as its file says it.

    Attributes:
        file: where that stood.
        content: a sweep file of the same runs that needs no other file; without storage options, which go nowhere.
        output: folder of the sweep.
        runs: in order.
        runs_at_once: as in `SweepFile`.
    """

    file: str
    content: Section
    output: Path
    runs: tuple[SweepRun, ...]
    runs_at_once: int | None


def read_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file and work out its runs.

    Args:
        path: of the YAML file.
        overrides: such as `steps=500` or `optimizer.learning_rate=1e-3`, in place of what the file says.
    Raises:
        ConfigError: the file, one it starts from, or a run's settings cannot be used; names the run.
    """
    file = read_settings(SweepFile, path, overrides)
    common = _read_common(file, Path(path))
    runs: list[SweepRun] = []
    for name, labels, values in _list_named(file, common) if file.runs else _multiply(file, common):
        _check_name(name, [run.name for run in runs], path)
        values["output"] = str(Path(file.output) / name)
        settings = build_settings(TrainSettings, values, where=f"{path}: run {name!r}")
        runs.append(SweepRun(name=name, labels=labels, settings=settings))
    return Sweep(
        file=str(path),
        content=_without_secrets(_describe(file, common)),
        output=Path(file.output),
        runs=tuple(runs),
        runs_at_once=file.runs_at_once,
    )


def merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> Section:
    """Values with changes: sections key by key, everything else as a whole. Both stay as they are."""
    merged = dict(values)
    for key, change in changes.items():
        before = merged.get(key)
        is_section = isinstance(change, Mapping) and isinstance(before, Mapping)
        merged[key] = merge(before, change) if is_section else copy.deepcopy(change)  # type: ignore[arg-type]
    return merged


class _AnyFile(Settings):
    """A file of which `TrainSettings` will say whether its keys can be used."""

    model_config = ConfigDict(extra="allow")


def _read_common(file: SweepFile, path: Path) -> Section:
    """The settings that all runs start from."""
    own = dict(file.model_extra or {})
    if unknown := sorted(own.keys() - TrainSettings.model_fields.keys()):
        raise ConfigError(
            f"{path}: expected keys of a sweep ({', '.join(SweepFile.model_fields)}) or of train.yaml "
            f"({', '.join(TrainSettings.model_fields)}), found {', '.join(unknown)}"
        )
    for key, axis in _AXIS_OF_KEY.items():
        if key in own and getattr(file, axis) and not file.runs:
            advice = "; the order of the records has order_seed" if key == "seed" else ""
            raise ConfigError(f"{path}: {key}: expected this or {axis}, found both{advice}")
    if file.train is None:
        return own
    start = read_settings(_AnyFile, path.parent / file.train)
    return merge(start.model_extra or {}, own)


def _describe(file: SweepFile, common: Section) -> Section:
    """The file with what it starts from and the overrides in it."""
    fields = SweepFile.model_fields.keys() - {"train"}
    content = {**common, **file.model_dump(mode="json", include=fields, exclude_defaults=True)}
    for key, axis in _AXIS_OF_KEY.items():
        if getattr(file, axis) and not file.runs and key in content:
            value = content.pop(key)
            if key == "seed":
                content.setdefault("order_seed", value)
    return content


def _multiply(file: SweepFile, common: Section) -> Iterator[tuple[str, dict[str, str], Section]]:
    """Name, labels and settings of every combination."""
    axes: list[list[tuple[str, str, Section]]] = [
        [(key, name, {key: section}) for name, section in sections.items()]
        for key, sections in (("student", file.students), ("loss", file.losses))
        if sections
    ]
    axes += [[(axis, name, changes) for name, changes in values.items()] for axis, values in file.axes.items()]
    if file.seeds:
        axes.append([("seed", str(seed), {"seed": seed}) for seed in file.seeds])
    for chosen in itertools.product(*axes):
        values = copy.deepcopy(common)
        for axis, _, changes in chosen:
            # A student or a loss is a whole section: keys of another one would not fit it.
            values = {**values, **copy.deepcopy(changes)} if axis in _AXIS_OF_KEY else merge(values, changes)
        name = "-".join(f"seed{value}" if axis == "seed" else value for axis, value, _ in chosen)
        yield name, {axis: value for axis, value, _ in chosen}, _share_order(values, common)


def _list_named(file: SweepFile, common: Section) -> Iterator[tuple[str, dict[str, str], Section]]:
    """Name, labels and settings of every run of a list."""
    found: list[tuple[str, dict[str, str], Section]] = []
    for run in file.runs:
        changes, labels = dict(run.model_extra or {}), {}
        values = dict(common)
        for key, sections in (("student", file.students), ("loss", file.losses)):
            if isinstance(changes.get(key), str):
                labels[key] = changes.pop(key)
                values[key] = _find_section(sections, labels[key], f"run {run.name!r}: {key}", _AXIS_OF_KEY[key])
        values = merge(values, changes)
        found.append((run.name, labels, _share_order(values, common)))
    named = {"student": file.students, "loss": file.losses}
    named = {key: sections for key, sections in named.items() if any(key in labels for _, labels, _ in found)}
    differing = _find_differences([values for _, _, values in found], set(named))
    for name, labels, values in found:
        for key, sections in named.items():
            labels.setdefault(key, _name_section(sections, values.get(key)))
        others = {key: "–" if (value := _find(values, key)) is None else str(value) for key in differing}
        yield name, {**labels, **others}, values


def _find_section(sections: Mapping[str, Section], name: str, where: str, axis: str) -> Section:
    if name not in sections:
        raise ConfigError(f"{where}: expected a name of {axis} ({', '.join(sections) or 'none'}), found {name!r}")
    return copy.deepcopy(sections[name])


def _name_section(sections: Mapping[str, Section], section: Section | None) -> str:
    """A name for a section that a run was not given by name: the same for the same settings."""
    if section is None:
        return "–"
    known = (name for name, other in sections.items() if other == section)
    return next(known, None) or ", ".join(f"{name}={_find(section, name)}" for name in _list_leaves(section))


def _share_order(values: Section, common: Section) -> Section:
    """The settings with the order of the records that all runs have, whatever their seeds are."""
    if "order_seed" in values:
        return values
    order_seed = common.get("seed", TrainSettings.model_fields["seed"].default)
    # A run of the order's own seed needs no other: it is the one that train.yaml alone would give.
    return values if values.get("seed", order_seed) == order_seed else {**values, "order_seed": order_seed}


def _find_differences(runs: Sequence[Section], named: set[str]) -> list[str]:
    """Dotted names of the settings that are not the same in all runs; sections with names of their own are left out."""
    names = dict.fromkeys(name for values in runs for name in _list_leaves(values))
    return [
        name
        for name in names
        if name.partition(".")[0] not in {*named, "order_seed", "storage_options"}
        and len({repr(_find(values, name)) for values in runs}) > 1
    ]


def _list_leaves(values: Section, prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _list_leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _find(values: Section, name: str) -> object:
    found: object = values
    for key in name.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return _without_secrets(found)


def _check_name(name: str, earlier: Sequence[str], path: str | Path) -> None:
    if not _NAME.fullmatch(name) or name in RESULT_FILES:
        raise ConfigError(
            f"{path}: expected names of letters, digits, '.', '_', '+' and '-', for a run is a folder, found {name!r}"
        )
    if name in earlier:
        raise ConfigError(f"{path}: expected a name of its own for every run, found {name!r} twice")


def _without_secrets(values: Any) -> Any:
    """Plain values without `storage_options`, at any depth, and without the secrets of URLs."""
    if isinstance(values, Mapping):
        return {key: _without_secrets(value) for key, value in values.items() if key != "storage_options"}
    if isinstance(values, list | tuple):
        return [_without_secrets(value) for value in values]
    return hide_secrets(values) if isinstance(values, str) else values
