"""Where capture actors fit: what each asks for, how many machines have room for, and whether any machine ever will."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import ray

from cluster.connection import PRIVATE_CLUSTER
from cluster.settings import ActorGroupSettings
from logitstore.errors import ConfigError
from logitstore.teacher.protocol import TeacherSettings

Resources = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A living machine of the cluster: everything it has, whoever uses it now."""

    node_id: str
    resources: Resources
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ActorDemand:
    """What one actor asks for.

    Attributes:
        across_machines: its GPUs may be of several machines; the rest is asked of the machine with the first of them.
    """

    cpus: float
    gpus: float
    resources: Resources = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    across_machines: bool = False

    def __str__(self) -> str:
        others = [f"{amount:g} {name}" for name, amount in self.resources.items()]
        labels = [f"{name}={value}" for name, value in self.labels.items()]
        where = [f"a machine labelled {', '.join(labels)}"] if labels else []
        return ", ".join([f"{self.cpus:g} CPUs", f"{self.gpus:g} GPUs", *others, *where])

    @property
    def amounts(self) -> dict[str, float]:
        """By Ray's names, nothing of which none is wanted."""
        amounts = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return {name: amount for name, amount in amounts.items() if amount}

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Of its placement group where GPUs may be of several machines: one for each GPU, as vLLM wants them."""
        return [self.amounts | {"GPU": 1.0}, *({"GPU": 1.0} for _ in range(round(self.gpus) - 1))]

    def count_in(self, node: Resources) -> int:
        """How many such actors a machine of these resources has room for."""
        # Fractions of GPUs add up to a little more or less than they are.
        return int(min((node.get(name, 0.0) / amount + 1e-9 for name, amount in self.amounts.items()), default=0))

    def suits(self, machine: Machine) -> bool:
        """Whether a machine has the labels that are asked for."""
        return all(machine.labels.get(name) == value for name, value in self.labels.items())


def read_machines() -> list[Machine]:
    """Every living machine of the cluster that we are connected to."""
    return [
        Machine(node_id=node["NodeID"], resources=node["Resources"], labels=node.get("Labels") or {})
        for node in ray.nodes()
        if node["Alive"]
    ]


def build_demand(
    settings: ActorGroupSettings, nodes: Sequence[Resources], num_gpus: int = 1, *, needs_gpus: bool = False
) -> ActorDemand:
    """What an actor asks for: as set, or `num_gpus` where there are GPUs, and two CPUs where a machine has two.

    Args:
        settings: of its group.
        nodes: resources of the machines.
        num_gpus: that its teacher runs on, where there are any.
        needs_gpus: it cannot do without, so that they are asked for where there are none yet.
    """
    has_gpus = needs_gpus or any(node.get("GPU", 0.0) > 0 for node in nodes)
    most_cpus = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
    return ActorDemand(
        cpus=settings.cpus if settings.cpus is not None else min(2.0, most_cpus) or 1.0,
        gpus=settings.gpus if settings.gpus is not None else float(has_gpus * num_gpus),
        resources=settings.resources or {},
        labels=settings.labels or {},
    )


def build_teacher_demand(
    settings: ActorGroupSettings, machines: Sequence[Machine], teacher: TeacherSettings
) -> ActorDemand:
    """What an actor that runs this teacher asks for.

    Raises:
        ConfigError: a teacher across machines is given other than one GPU for each of its parts.
    """
    nodes = [machine.resources for machine in machines]
    across = teacher.vllm is not None and teacher.vllm.across_machines and teacher.num_gpus > 1
    demand = build_demand(settings, nodes, teacher.num_gpus, needs_gpus=across or teacher.device == "cuda")
    if across and demand.gpus != teacher.num_gpus:
        raise ConfigError(
            f"actors.gpus: expected {teacher.num_gpus}, tensor_parallel_size × pipeline_parallel_size of a teacher "
            f"across machines, found {demand.gpus:g}; leave it out"
        )
    return ActorDemand(
        cpus=demand.cpus,
        gpus=demand.gpus,
        resources=demand.resources,
        labels=demand.labels,
        across_machines=across,
    )


def count_actors(settings: ActorGroupSettings, demand: ActorDemand, nodes: Sequence[Resources]) -> int:
    """How many actors to start: as set, or as many as the machines have room for."""
    if settings.count is not None:
        return settings.count
    return max(1, min(sum(demand.count_in(node) for node in nodes), settings.max or 2**31))


def count_rooms(demands: Sequence[ActorDemand], counts: Sequence[int | None], machines: Sequence[Machine]) -> list[int]:
    """How many actors of each group the machines have room for, when earlier groups take theirs first.

    Args:
        demands: of each group.
        counts: the most actors of each group, None for any number.
        machines: of the cluster.
    """
    free = [dict(machine.resources) for machine in machines]
    rooms = []
    for demand, count in zip(demands, counts, strict=True):
        suitable = [node for node, machine in zip(free, machines, strict=True) if demand.suits(machine)]
        if demand.across_machines:
            rooms.append(0)
            while rooms[-1] != count and _place_across(demand, suitable):
                rooms[-1] += 1
            continue
        room = 0
        for node in suitable:
            fits = demand.count_in(node) if count is None else min(demand.count_in(node), count - room)
            for name, amount in demand.amounts.items():
                node[name] = node.get(name, 0.0) - fits * amount
            room += fits
        rooms.append(room)
    return rooms


def _place_across(demand: ActorDemand, nodes: Sequence[dict[str, float]]) -> bool:
    """Take one actor's bundles from machines as Ray packs them; False, and nothing taken, where they do not all fit.

    The first bundle goes where most GPUs are free, and as many of the others with it as there is room for.
    """
    first, *others = demand.bundles
    homes = [node for node in nodes if all(node.get(name, 0.0) + 1e-9 >= amount for name, amount in first.items())]
    if not homes or sum(map(_count_gpus, nodes)) < len(demand.bundles):
        return False
    home = max(homes, key=_count_gpus)
    for name, amount in first.items():
        home[name] -= amount
    left = len(others)
    for node in [home, *sorted((node for node in nodes if node is not home), key=_count_gpus, reverse=True)]:
        fits = min(left, _count_gpus(node))
        node["GPU"] = node.get("GPU", 0.0) - fits
        left -= fits
    return True


def _count_gpus(node: Resources) -> int:
    """Whole ones: a bundle has no halves of two."""
    return int(node.get("GPU", 0.0) + 1e-9)


def check_placeable(demand: ActorDemand, machines: Sequence[Machine]) -> None:
    """Refuse a demand that no machine can ever meet, where no machine can be added.

    Raises:
        ConfigError: the cluster is one that `connect` started here, and it is too small for one actor.
    """
    if is_private(machines) and not any(count_rooms([demand], [1], machines)):
        raise ConfigError(
            f"actors: expected a machine with {demand}, which one actor asks for, found {describe_machines(machines)}; "
            "set actors.cpus and actors.gpus to what there is"
        )


def is_private(machines: Sequence[Machine]) -> bool:
    """Whether the cluster is one that `connect` started on this machine: no other will ever join it."""
    return any(PRIVATE_CLUSTER in machine.resources for machine in machines)


def describe_machines(machines: Sequence[Machine]) -> str:
    """'1 × (2 CPUs, 0 GPUs)', one for each kind of machine."""
    kinds = [(machine.resources.get("CPU", 0.0), machine.resources.get("GPU", 0.0)) for machine in machines]
    parts = [f"{kinds.count(kind)} × ({kind[0]:g} CPUs, {kind[1]:g} GPUs)" for kind in dict.fromkeys(kinds)]
    return " + ".join(parts) or "no machine"
