"""What a process that trains asks of the cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from cluster.connection import PRIVATE_CLUSTER
from logitstore.errors import ConfigError

Resources = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class WorkerDemand:
    """What one process asks for."""

    cpus: float
    gpus: float

    @property
    def amounts(self) -> dict[str, float]:
        """By Ray's names, nothing of which none is wanted."""
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}


def find_worker_demand(cpus: float | None = None, gpus: float | None = None, *, workers: int = 1) -> WorkerDemand:
    """What every process asks for on the cluster that we are connected to.

    Args:
        cpus: None is one.
        gpus: None is one where the cluster has any.
        workers: so many processes at a time.

    Raises:
        ConfigError: there is no room, and no machine can join.
    """
    nodes: list[Resources] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    demand = build_worker_demand(nodes, cpus, gpus)
    check_room(nodes, demand, workers)
    return demand


def build_worker_demand(nodes: Sequence[Resources], cpus: float | None, gpus: float | None) -> WorkerDemand:
    """See `find_worker_demand`; nodes are the resources of the cluster's machines."""
    has_gpus = any(node.get("GPU", 0.0) > 0 for node in nodes)
    return WorkerDemand(cpus=1.0 if cpus is None else cpus, gpus=float(has_gpus) if gpus is None else gpus)


def check_room(nodes: Sequence[Resources], demand: WorkerDemand, workers: int) -> None:
    """Refuse what a cluster that `connect` started on this machine has no room for, now or ever.

    Raises:
        ConfigError: says what there is.
    """
    if not any(PRIVATE_CLUSTER in node for node in nodes):
        return  # machines may join
    found = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    if any(amount * workers > found[name] for name, amount in demand.amounts.items()):
        raise ConfigError(
            f"workers: expected room for {workers} with {demand.cpus:g} CPUs and {demand.gpus:g} GPUs each, found "
            f"{found['CPU']:g} CPUs and {found['GPU']:g} GPUs on this machine; ask for less, or name a cluster with "
            "--address"
        )
