"""The loop of a capture: units to actors, receipts back, while machines come and go."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from cluster.actor import LoadedTeacher
from cluster.actor_groups import build_groups, find_room, plan_counts
from cluster.capture_watch import CaptureWatch
from cluster.draining import should_hand_back
from cluster.figures import CaptureFigures
from cluster.load_ends import LoadEnd, LoadEnds
from cluster.placement import check_placeable, describe_machines, is_private
from cluster.pool import ActorPool, EndedCall, Slot
from cluster.progress import describe_seconds
from cluster.ray_cluster import Cluster
from cluster.settings import ClusterCaptureSettings
from cluster.unit_ends import UnitEnds
from cluster.unit_patience import find_unit_limit
from cluster.unit_queue import QueueLimits, UnitQueue
from logitstore.store.commit import build_attempt
from logitstore.store.files import StoreFiles

_LOG = logging.getLogger("logitstore.capture")
_WAIT_SECONDS = 1.0
_SECONDS_BETWEEN_WARNINGS = 30.0
# A machine has 30 seconds from the shortest notice that a cloud gives.
_SECONDS_BETWEEN_LOOKS = 2.0
_LOOKS_PER_MACHINES = 5
# A driver that has not looked for so long was not there to see what ended meanwhile.
_AWAY_SECONDS = 30.0


class CaptureLoop:
    """Captures units on a cluster; knows the store only as the place where a unit is set aside.

    Args:
        settings: of the capture.
        cluster: where actors are started.
        files: the store.
        figures, watch: of the capture.
        most_actors: since there are no more units, as far as somebody knows before `fill`.
    Raises:
        ConfigError: no machine has what an actor asks for, and none can join.
    """

    def __init__(
        self,
        settings: ClusterCaptureSettings,
        cluster: Cluster,
        files: StoreFiles,
        figures: CaptureFigures,
        watch: CaptureWatch,
        *,
        most_actors: int | None = None,
    ) -> None:
        self._most_actors = most_actors
        self._settings, self._cluster, self._files = settings, cluster, files
        self._figures, self._watch = figures, watch
        machines = cluster.read_machines()
        self._is_private = is_private(machines)
        self._groups = build_groups(settings, machines)
        for group in self._groups:
            check_placeable(group.demand, machines)
        find_room(self._groups, machines)
        self._pool = ActorPool(cluster)
        self._loads = LoadEnds(settings, self._pool, figures)
        self._hungry: dict[int, Slot] = {}  # who may be sent a unit
        self._num_looks = 0
        self._next_look = 0.0
        self._last_look = time.monotonic()
        self._next_warning = time.monotonic() + _SECONDS_BETWEEN_WARNINGS
        self.fill(None)

    @property
    def has_units(self) -> bool:
        return self._queue.has_units

    def load_first(self) -> LoadedTeacher:
        """Let every actor load; the first teacher that is there says who it is."""
        while self._loads.first is None:
            self.step()
        return self._loads.first

    def fill(self, units: Sequence[int] | None, *, retried: frozenset[int] = frozenset()) -> None:
        """These are to be captured: call once, when it is known.

        Args:
            units: in order; None while nobody knows.
            retried: those that an earlier run set aside.
        """
        tries = self._settings.actors.tries
        self._num_units_is_known = units is not None
        self._queue = UnitQueue(units or (), QueueLimits(tries=tries))
        self._ends = UnitEnds(
            self._files, self._queue, self._pool, self._figures, self._watch, tries=tries, retried=retried
        )
        for slot in self._pool.slots.values():
            if slot.is_ready and not slot.is_retired:
                self._queue.admit(slot.number)
        self._next_look = 0.0

    def close(self) -> None:
        """Let all actors go."""
        self._pool.close()
        self.show_figures()

    def step(self) -> None:
        """Give every rested actor work, loading first, then units; take in whatever has ended."""
        now = time.monotonic()
        if now >= self._next_look:
            self._look(now)
        self._pool.load_rested(now)
        self._feed(now)
        for number in self._queue.find_spare(self._pool.slots):
            self._let_go(self._pool.slots[number])
        for call in self._pool.wait(_WAIT_SECONDS):
            if call.unit is None:
                self._end_load(call)
            else:
                self._ends.end(call, call.unit)
            self._note_hunger(call.slot)
        self._warn_if_nobody_is_ready()
        if self._watch.is_due:
            self.show_figures()

    def show_figures(self) -> None:
        """Bring what is watched up to date."""
        figures = self._figures
        figures.actors_ready, figures.actors_wanted = self._pool.num_ready, len(self._pool.slots)
        figures.units_in_flight = self._queue.num_in_flight
        self._watch.update(self._queue.list_in_flight())

    def _feed(self, now: float) -> None:
        """Send units to whoever has fewer than it may; near the end one to each, so that nobody is left to wait."""
        limit = self._settings.actors.units_in_flight
        is_near_end = self._queue.num_pending <= self._pool.num_ready
        for slot in list(self._hungry.values()):
            if is_near_end and slot.calls:
                continue
            if not self._queue.has_due(now):
                return
            ahead = 1 if is_near_end else limit
            while (unit := self._queue.take(slot.number, now=now, ahead=ahead)) is not None:
                self._pool.capture(slot, unit, build_attempt(), self._ends.find_care(unit))
            if len(slot.calls) >= limit:
                del self._hungry[slot.number]

    def _note_hunger(self, slot: Slot) -> None:
        """After a call has ended: whether the actor takes more, or goes because its machine does."""
        if slot.is_retired and not slot.calls and slot.number in self._pool.slots:
            self._let_go(slot)
        elif slot.is_ready and not slot.is_retired:
            self._hungry[slot.number] = slot
        else:
            self._hungry.pop(slot.number, None)

    def _let_go(self, slot: Slot) -> None:
        self._hungry.pop(slot.number, None)
        self._queue.forget(slot.number)
        self._pool.release(slot)

    def _look(self, now: float) -> None:
        """Look at the cluster: what is to be taken away, what has joined, and how many actors there should be."""
        self._next_look = now + _SECONDS_BETWEEN_LOOKS
        away, self._last_look = now - self._last_look, now
        if away >= _AWAY_SECONDS:
            self._pool.forgive(away)
        self._give_up_hanging(now)
        if not self._is_private:
            draining = self._cluster.read_draining()
            for slot in list(self._pool.slots.values()) if draining else ():
                nodes = slot.loaded.node_ids if slot.loaded is not None else ()
                if any(node in draining for node in nodes):
                    left = [seconds for node in nodes if (seconds := draining.get(node)) is not None]
                    self._drain(slot, min(left, default=None), now)
            if self._num_looks % _LOOKS_PER_MACHINES == 0:
                machines = self._cluster.read_machines()
                find_room(self._groups, [machine for machine in machines if machine.node_id not in draining])
        self._num_looks += 1
        self._start_and_release()

    def _drain(self, slot: Slot, seconds_left: float | None, now: float) -> None:
        """An actor's machine will be taken away: see `draining.py`."""
        if not slot.is_retired:
            slot.is_retired = True
            self._hungry.pop(slot.number, None)
            self._queue.retire(slot.number)
            for unit in reversed(self._pool.take_back(slot)):
                self._queue.hand_back(slot.number, unit)
            when = "" if seconds_left is None else f" in {seconds_left:.0f} s"
            _LOG.warning("%s will be taken away%s: its actor is sent no more units", slot.host, when)
        running = now - slot.busy_since
        typical = slot.group.unit_seconds
        if not slot.calls:
            self._let_go(slot)
        elif should_hand_back(seconds_left=seconds_left, running_seconds=running, typical_seconds=typical):
            _LOG.warning("%s will be taken away too soon for the unit that it is at: it goes back", slot.host)
            self._let_go(slot)

    def _give_up_hanging(self, now: float) -> None:
        """Actors that have been at their unit for too long; see `unit_patience.py`."""
        for slot in list(self._pool.slots.values()):
            unit = slot.unit
            if unit is None:
                continue
            limit = find_unit_limit(
                self._settings.actors.unit_seconds,
                slowest_seconds=slot.group.slowest_seconds,
                with_care=self._ends.find_care(unit) is not None,
            )
            running = now - slot.busy_since
            if limit is None or running < limit / 2:
                continue
            if running >= limit:
                self._ends.end_hanging(slot, unit, running)
                self._note_hunger(slot)
            elif slot.warned_unit != unit:
                slot.warned_unit = unit
                _LOG.warning(
                    "the actor on %s has been at unit %d for %s, and is given up after %s",
                    slot.host, unit, describe_seconds(running), describe_seconds(limit),
                )  # fmt: skip

    def _start_and_release(self) -> None:
        """Bring the number of actors to what it should be; of those that are ready none goes for that."""
        useful = self._queue.num_useful if self._num_units_is_known else self._most_actors
        kept = None if useful is None else useful + self._queue.wants_reserve
        slots = [slot for slot in self._pool.slots.values() if not slot.is_retired]
        owned = [[slot for slot in slots if slot.group is group] for group in self._groups]
        ready = [sum(slot.is_ready for slot in own) for own in owned]
        counts, mosts = (plan_counts(self._groups, bound, ready) for bound in (useful, kept))
        for group, own, count, most in zip(self._groups, owned, counts, mosts, strict=True):
            for _ in range(count - len(own)):
                self._pool.add(group)
            for slot in [slot for slot in reversed(own) if not slot.is_ready][: max(0, len(own) - most)]:
                self._let_go(slot)
        drop = self._loads.last_drop
        if not self._pool.slots and useful != 0 and drop is not None:
            raise drop  # so many could not load over time that nobody is to take the place of the lost ones

    def _warn_if_nobody_is_ready(self) -> None:
        now = time.monotonic()
        if self._pool.num_ready or self._loads.is_failing:
            self._next_warning = now + _SECONDS_BETWEEN_WARNINGS
        elif now >= self._next_warning:
            self._next_warning = now + _SECONDS_BETWEEN_WARNINGS
            free = self._cluster.read_free()
            _LOG.warning(
                "no actor is ready yet; each asks for %s, the cluster has %s, of which %g CPUs, %g GPUs are free",
                " or ".join(str(group.demand) for group in self._groups),
                describe_machines(self._cluster.read_machines()),
                free.get("CPU", 0.0),
                free.get("GPU", 0.0),
            )

    def _end_load(self, call: EndedCall) -> None:
        end = self._loads.end(call)
        if end is LoadEnd.READY:
            self._queue.admit(call.slot.number)
        elif end is LoadEnd.DROPPED:
            self._let_go(call.slot)
