"""Where training runs: in this process, or in processes of a Ray cluster."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from logitstore.errors import ConfigError

if TYPE_CHECKING:
    from cluster.worker_demand import WorkerDemand

Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster: auto, host:port or ray://host:port; one on this machine with --workers alone."),
]
Cpus = Annotated[float | None, typer.Option(min=0.0, help="CPUs that every worker asks for; 1 unless given.")]
Gpus = Annotated[
    float | None,
    typer.Option(min=0.0, help="GPUs that every worker asks for; 1 unless given, where the cluster has GPUs."),
]


_OF_RAY_TRAIN = ("ray", "pandas", "requests")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A cluster, and what is asked of it.

    Attributes:
        address: as in `cluster.connection.connect`.
        workers: processes at a time; None where it was not said.
        cpus, gpus: of every worker; None where it was not said.
    """

    address: str | None
    workers: int | None
    cpus: float | None
    gpus: float | None

    @contextmanager
    def join(self) -> Iterator[WorkerDemand]:
        """Be connected to the cluster while the block runs; what each worker asks for.

        Raises:
            ConfigError: Ray is not installed, or a cluster of this machine alone has no room for the workers.
            OutsideError: there is no cluster at the address.
        """
        _check_installed()
        from cluster.connection import connect
        from cluster.worker_demand import find_worker_demand

        with connect(self.address):
            yield find_worker_demand(self.cpus, self.gpus, workers=self.workers or 1)


def _check_installed() -> None:
    missing = [name for name in _OF_RAY_TRAIN if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"python environment: expected what training on Ray needs, found no {', '.join(missing)}; install it with\n"
            "  pip install 'logitstore[ray-train]'"
        )


def choose_place(address: str | None, workers: int | None, cpus: float | None, gpus: float | None) -> Place | None:
    """The cluster that was asked for; None is this process.

    Raises:
        ConfigError: CPUs or GPUs are asked of no cluster.
    """
    if address is not None or workers is not None:
        return Place(address=address, workers=workers, cpus=cpus, gpus=gpus)
    if cpus is not None or gpus is not None:
        raise ConfigError("--cpus, --gpus: expected --address or --workers beside them, found neither")
    return None
