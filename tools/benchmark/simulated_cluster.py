"""Actors without Ray that answer at once, and a bucket that counts what is asked of it: what is left is the driver."""

from __future__ import annotations

import datetime
import random
from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from fsspec.spec import AbstractFileSystem

if TYPE_CHECKING:
    from cluster.actor_groups import ActorGroup
    from cluster.placement import Machine

_KEYS_PER_PAGE = 1000
_SEED = 7


class CountingBucket(AbstractFileSystem):  # type: ignore[misc]  # fsspec is untyped
    """Objects in memory, and commits of the first `num_committed` units that are only listed; there is no network.

    `requests` counts what an object store would charge for, by kind.
    """

    protocol = "counting-bucket"
    cachable = False
    requests: ClassVar[Counter[str]] = Counter()
    objects: ClassVar[dict[str, bytes]] = {}

    def __init__(self, num_committed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self._num_committed = num_committed

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[dict[str, Any]]:
        """Entries of a folder, as s3fs makes them of a bucket's pages."""
        folder = path.rstrip("/") + "/"
        entries = [self._describe(name, len(data)) for name, data in self.objects.items() if name.startswith(folder)]
        if folder.endswith("/commits/"):
            entries += [self._describe(f"{folder}{unit:07d}.json", 4000) for unit in range(self._num_committed)]
        self.requests["list"] += -(-max(1, len(entries)) // _KEYS_PER_PAGE)
        if not entries:
            raise FileNotFoundError(path)
        return entries

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Of one object."""
        self.requests["head"] += 1
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self._describe(path, len(self.objects[path]))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """Its bytes."""
        self.requests["get"] += 1
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path][start:end]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        """Put an object; with mode "create" only where there is none."""
        self.requests["put"] += 1
        if mode == "create" and path in self.objects:
            raise FileExistsError(path)
        self.objects[path] = bytes(value)

    def rm_file(self, path: str) -> None:
        """Delete an object."""
        self.requests["delete"] += 1
        if self.objects.pop(path, None) is None:
            raise FileNotFoundError(path)

    def _rm(self, path: str) -> None:
        self.rm_file(path)

    @staticmethod
    def _describe(key: str, num_bytes: int) -> dict[str, Any]:
        return {
            "Key": key,
            "LastModified": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
            "ETag": f'"{key[-32:]}"',
            "Size": num_bytes,
            "StorageClass": "STANDARD",
            "type": "file",
            "size": num_bytes,
            "name": key,
        }


class SimulatedCluster:
    """One machine with room for `num_actors`, whose calls end as soon as somebody waits; see `cluster.ray_cluster`.

    Args:
        num_actors: that there is room for.
        most_at_a_time: calls that one wait finds ended, oldest first.
        failing, losing: shares of units whose actor says that it failed, or dies.
    """

    def __init__(
        self, num_actors: int, *, most_at_a_time: int = 1 << 30, failing: float = 0.0, losing: float = 0.0
    ) -> None:
        self._num_actors, self._most = num_actors, most_at_a_time
        self._failing, self._losing = failing, losing
        self._random = random.Random(_SEED)
        self._answers: dict[int, Callable[[], Any]] = {}
        self._ended: deque[int] = deque()
        self._next_call = 0

    def read_machines(self) -> list[Machine]:
        from cluster.placement import Machine

        return [Machine(node_id="n0", resources={"CPU": float(self._num_actors)})]

    def read_draining(self) -> dict[str, float | None]:
        return {}

    def read_free(self) -> dict[str, float]:
        return {}

    def start(self, number: int, group: ActorGroup) -> int:
        return number

    def end(self, actor: int) -> None:
        pass

    def load(self, actor: int) -> int:
        return self._call(build_loaded_teacher)

    def capture(self, actor: int, unit: int, attempt: str, care: Any) -> int:
        return self._call(lambda: self._capture(unit))

    def wait(self, timeout: float) -> list[int]:
        ended = [self._ended.popleft() for _ in range(min(self._most, len(self._ended)))]
        return [call for call in ended if call in self._answers]

    def fetch(self, call: int) -> Any:
        return self._answers.pop(call)()

    def forget(self, call: int, *, cancel: bool = False) -> None:
        del self._answers[call]

    def _call(self, answer: Callable[[], Any]) -> int:
        self._next_call += 1
        self._answers[self._next_call] = answer
        self._ended.append(self._next_call)
        return self._next_call

    def _capture(self, unit: int) -> Any:
        from ray.exceptions import ActorDiedError, RayTaskError

        from logitstore.errors import TeacherError

        if self._failing or self._losing:
            drawn = self._random.random()
            if drawn < self._losing:
                raise ActorDiedError
            if drawn < self._losing + self._failing:
                cause = TeacherError("simulated")
                raise RayTaskError("capture", "a traceback", cause).as_instanceof_cause()
        return build_receipt(unit)


def build_loaded_teacher() -> Any:
    """The teacher of a simulated plan, loaded."""
    from cluster.actor import LoadedTeacher
    from tools.benchmark.simulated_store import build_simulated_teacher

    return LoadedTeacher(identity=build_simulated_teacher(), host="simulated", process=0, node_ids=("n0",))


def build_receipt(unit: int) -> Any:
    """Of a unit of a million positions that was committed."""
    from logitstore.capture import Receipt
    from logitstore.store.commit import Outcome

    return Receipt(
        unit=unit,
        outcome=Outcome.WON,
        records=250,
        positions=1_000_000,
        bytes=500_000_000,
        documents=1000,
        dead_letters=0,
        seconds=100.0,
    )
