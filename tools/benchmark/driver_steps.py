"""The steps of `logitstore benchmark driver`, each in a process of its own: `python -m tools.benchmark.driver_steps`.

What runs is the driver's own code: look at the store, plan, queue, pool, loop, progress and metrics.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.benchmark.own_process import print_measured

if TYPE_CHECKING:
    from cluster.capture_loop import CaptureLoop
    from cluster.capture_watch import CaptureWatch
    from cluster.figures import CaptureFigures
    from cluster.ray_cluster import Cluster
    from cluster.settings import ClusterCaptureSettings

# Folder of the corpus, units, actors; returns what is measured, and that what to say of its outcome.
Step = Callable[[Path, int, int], Callable[[], str]]
_NUM_FILES = 100
_RAY_ACTORS = 2


def nothing(folder: Path, num_units: int, num_actors: int) -> Callable[[], str]:
    """Import what every step imports."""
    import cluster.driver  # noqa: F401

    return lambda: ""


def resume(folder: Path, num_units: int, num_actors: int) -> Callable[[], str]:
    """From the command to the first unit sent, with half of the units committed."""
    from tools.benchmark.simulated_cluster import CountingBucket, SimulatedCluster

    settings = _build_settings(folder, num_units, 0)
    _make_plan(settings)
    settings = settings.model_copy(update={"storage_options": {"num_committed": num_units // 2}})
    CountingBucket.requests.clear()

    def measure() -> str:
        loop, *_ = _build_loop(settings, SimulatedCluster(num_actors))
        loop.step()
        asked = ", ".join(f"{count:,} {kind}" for kind, count in sorted(CountingBucket.requests.items()))
        return f"{num_units - num_units // 2:,} units to do; requests: {asked}"

    return measure


def _capture(folder: Path, num_units: int, num_actors: int, **options: Any) -> Callable[[], str]:
    from tools.benchmark.simulated_cluster import CountingBucket, SimulatedCluster

    settings = _build_settings(folder, num_units, 0)
    _make_plan(settings)
    loop, figures, watch = _build_loop(settings, SimulatedCluster(num_actors, **options))
    CountingBucket.requests.clear()
    logging.getLogger("logitstore").setLevel(logging.CRITICAL)

    def measure() -> str:
        with watch:
            while loop.has_units:
                loop.step()
            loop.close()
        ended = figures.units_captured + figures.quarantined
        assert ended == num_units, figures
        return (
            f"{figures.failures:,} failures, {figures.actor_losses:,} lost actors; "
            f"{CountingBucket.requests.total():,} requests"
        )

    return measure


def in_bulk(folder: Path, num_units: int, num_actors: int) -> Callable[[], str]:
    """All that was sent has ended whenever the driver looks."""
    return _capture(folder, num_units, num_actors)


def one_by_one(folder: Path, num_units: int, num_actors: int) -> Callable[[], str]:
    """One unit has ended whenever the driver looks, so that it looks as often as there are units."""
    return _capture(folder, num_units, num_actors, most_at_a_time=1)


def with_failures(folder: Path, num_units: int, num_actors: int) -> Callable[[], str]:
    """Of a thousand units ten fail, and one loses its actor."""
    return _capture(folder, num_units, num_actors, failing=0.01, losing=0.001)


def by_callbacks(folder: Path, num_units: int, num_actors: int) -> Callable[[], str]:
    """With real actors of Ray, which answer without doing anything, and as many calls under way as of `num_actors`."""
    from cluster.ray_cluster import RayCluster

    return _capture_by_ray(folder, num_units, num_actors, RayCluster(_build_actor_class()))


def by_ray_wait(folder: Path, num_units: int, num_actors: int) -> Callable[[], str]:
    """The same, waiting as programs of Ray do: `ray.wait` for one of all calls, then for all that have ended."""
    import ray

    from cluster.ray_cluster import RayCluster

    class WaitingCluster(RayCluster):
        def wait(self, timeout: float) -> list[int]:
            number_of = {reference: number for number, reference in self._calls.items()}
            if not number_of:
                return []
            ray.wait(list(number_of), num_returns=1, timeout=timeout)
            ended, _ = ray.wait(list(number_of), num_returns=len(number_of), timeout=0)
            return sorted(number_of[reference] for reference in ended)

        def _follow(self, reference: Any) -> int:
            number = next(self._numbers)
            self._calls[number] = reference
            return number

    return _capture_by_ray(folder, num_units, num_actors, WaitingCluster(_build_actor_class()))


def _capture_by_ray(folder: Path, num_units: int, num_actors: int, cluster: Cluster) -> Callable[[], str]:
    from cluster.connection import connect

    ahead = max(1, 2 * num_actors // _RAY_ACTORS)
    settings = _build_settings(folder, num_units, 0, count=_RAY_ACTORS, cpus=0.001, units_in_flight=ahead)
    _make_plan(settings)
    connection = contextlib.ExitStack()
    connection.enter_context(connect(None, num_cpus=1))
    atexit.register(connection.close)  # not within what is measured
    loop, figures, watch = _build_loop(settings, cluster)

    def measure() -> str:
        with watch:
            while loop.has_units:
                loop.step()
            loop.close()
        assert figures.units_captured == num_units, figures
        return f"{_RAY_ACTORS} real actors, {2 * num_actors:,} calls under way"

    return measure


def _build_actor_class() -> Any:
    import ray

    class IdleActor:
        def __init__(self, settings: ClusterCaptureSettings) -> None:
            from tools.benchmark.simulated_cluster import build_loaded_teacher, build_receipt

            self._loaded, self._build_receipt = build_loaded_teacher(), build_receipt

        def load(self) -> Any:
            return self._loaded

        def capture(self, unit: int, attempt: str, care: object) -> Any:
            return self._build_receipt(unit)

    return ray.remote(IdleActor)


def _build_settings(folder: Path, num_units: int, num_committed: int, **actors: Any) -> ClusterCaptureSettings:
    """Of a capture of `num_units` units of text that is nothing but holes in files."""
    import fsspec

    from cluster.settings import ClusterCaptureSettings
    from logitstore.settings import build_settings
    from tools.benchmark.simulated_cluster import CountingBucket
    from tools.benchmark.simulated_store import UNIT_BYTES

    fsspec.register_implementation(CountingBucket.protocol, CountingBucket, clobber=True)
    num_files = min(num_units, _NUM_FILES)
    bounds = [num_units * i // num_files for i in range(num_files + 1)]
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        with (folder / f"part-{i:03d}.jsonl").open("wb") as file:
            file.truncate((stop - start) * UNIT_BYTES)
    values = {
        "store": "counting-bucket://bucket/store",
        "corpus": {"files": [f"{folder}/*.jsonl"]},
        "teacher": {"model": "simulated"},
        "unit_bytes": UNIT_BYTES,
        "actors": {"cpus": 1, **actors},
        "storage_options": {"num_committed": num_committed},
    }
    return build_settings(ClusterCaptureSettings, values, where="benchmark")


def _make_plan(settings: ClusterCaptureSettings) -> None:
    from logitstore.planning import open_plan
    from logitstore.store.files import StoreFiles
    from tools.benchmark.simulated_store import build_simulated_teacher

    open_plan(StoreFiles(settings.store, settings.storage_options), settings, build_simulated_teacher())


def _build_loop(settings: ClusterCaptureSettings, cluster: Cluster) -> tuple[CaptureLoop, CaptureFigures, CaptureWatch]:
    """Everything before the first unit is sent, as `cluster.driver` does it."""
    from cluster.capture_loop import CaptureLoop
    from cluster.capture_watch import CaptureWatch
    from cluster.figures import CaptureFigures
    from cluster.report import look_at_store
    from logitstore.planning import open_plan
    from logitstore.store.files import StoreFiles

    files = StoreFiles(settings.store, settings.storage_options)
    look = look_at_store(settings)
    assert look is not None
    to_do = look.standing.list_to_do(retry_quarantined=False)
    figures = CaptureFigures()
    watch = CaptureWatch(files, settings, figures, quiet=True)
    loop = CaptureLoop(settings, cluster, files, figures, watch, most_actors=len(to_do))
    open_plan(files, settings, loop.load_first().identity)
    loop.fill(to_do)
    look.standing.fill_figures(figures, retry_quarantined=False)
    figures.phase = "capturing"
    return loop, figures, watch


STEPS: dict[str, Step] = {
    step.__name__: step for step in (nothing, resume, in_bulk, one_by_one, with_failures, by_callbacks, by_ray_wait)
}


def main(name: str, folder: str, num_units: str, num_actors: str) -> None:
    """Run one step and print what was measured."""
    print_measured(STEPS[name](Path(folder), int(num_units), int(num_actors)))


if __name__ == "__main__":
    main(*sys.argv[1:])
