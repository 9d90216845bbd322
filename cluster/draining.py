"""Machines that are about to be taken away: who says so, and what becomes of the units that are on them.

There is one place where it is said, Ray's table of draining machines, for which there are several ways in:

- `ray start --block` drains its own machine when it is sent SIGTERM, as Kubernetes does to a pod that it evicts (for
  up to RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S seconds, of Ray 2.60 on);
- Ray's autoscaler drains machines before it ends them, and whoever runs `ray drain-node`;
- the actors of a capture watch their cloud's notice where `actors.notice` names the cloud (`preemption.py`).

Then the driver sends no more units there and takes back those that have not begun. The one that an actor is at is
waited for if it is likely to end in time, else it goes to another actor at once. Either way the actor ends before its
machine, and another is asked for, which Ray starts anywhere but on a draining machine. A unit that was handed back and
is committed by its first actor after all is committed once: see `logitstore/store/commit.py`.
"""

from __future__ import annotations

import logging
import time

import ray
from ray.exceptions import RayError

_LOG = logging.getLogger("logitstore.capture")
_ASK_SECONDS = 5.0
# For a commit's way to the storage, and for Ray to end the process.
MARGIN_SECONDS = 3.0


def read_draining() -> dict[str, float | None]:
    """Seconds that each draining machine has left, by its id in Ray; None where it may stay until it is idle.

    What cannot be asked counts as none: a notice that nobody hears costs what a machine does that goes without one.
    """
    try:
        if ray.util.client.ray.is_connected():  # only a process of the cluster can read the table
            reader = ray.remote(num_cpus=0)(_read_deadlines)
            deadlines: dict[str, int] = ray.get(reader.remote(), timeout=_ASK_SECONDS)
        else:
            deadlines = _read_deadlines()
    except (AttributeError, RayError, RuntimeError) as error:
        _LOG.debug("Ray does not tell which machines are draining: %s", error)
        return {}
    now = time.time()
    return {node_id: max(0.0, at / 1000 - now) if at else None for node_id, at in deadlines.items()}


def _read_deadlines() -> dict[str, int]:
    """As Ray's own training library reads them: there is no public function. Milliseconds, 0 for no deadline."""
    deadlines: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return deadlines


def should_hand_back(*, seconds_left: float | None, running_seconds: float, typical_seconds: float | None) -> bool:
    """Whether a unit goes to another actor, since the one that is at it will hardly end it in time.

    Args:
        seconds_left: of its machine; None for as long as it takes.
        running_seconds: that it has been at it.
        typical_seconds: what units take such actors; None before the first has ended.
    """
    if seconds_left is None:
        return False
    to_go = 0.0 if typical_seconds is None else max(0.0, typical_seconds - running_seconds)
    return seconds_left - MARGIN_SECONDS <= to_go
