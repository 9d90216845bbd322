"""Decisions of the queue: whom a failure is held against, and when a capture is given up. No Ray, no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest

from cluster.unit_queue import QueueLimits, UnitQueue, Verdict


@dataclass
class Simulation:
    """Actors that take turns at a queue, one call a second.

    Attributes:
        run: what an actor does with a unit: "won", "failed", "outside" or "lost".
        turns_per_unit: seconds that an actor needs; 1 by default.
        reload_seconds: after a restart or a loss.
    """

    queue: UnitQueue
    actors: Iterable[int]
    run: Callable[[int, int], str]
    turns_per_unit: dict[int, int] = field(default_factory=dict)
    reload_seconds: int = 3
    captured: list[int] = field(default_factory=list)
    set_aside: list[Verdict] = field(default_factory=list)
    restarts: dict[int, int] = field(default_factory=dict)
    calls: list[tuple[int, int]] = field(default_factory=list)
    gave_up_at: int | None = None

    def play(self, seconds: int = 10_000) -> None:
        numbers = list(self.actors)
        free_at = dict.fromkeys(numbers, 0)
        in_flight: dict[int, int] = {}
        for now in range(seconds):
            for actor in numbers:
                if now < free_at[actor] or self.gave_up_at is not None:
                    continue
                if actor in in_flight:
                    self._end(actor, in_flight.pop(actor), now, free_at)
                if now >= free_at[actor]:
                    self.queue.admit(actor)
                    unit = self.queue.take(actor, now=now)
                    if unit is not None:
                        in_flight[actor] = unit
                        free_at[actor] = now + self.turns_per_unit.get(actor, 1)
            if not self.queue.has_units or self.gave_up_at is not None:
                return
        raise AssertionError(f"units are left after {seconds} seconds")

    def _end(self, actor: int, unit: int, now: int, free_at: dict[int, int]) -> None:
        self.calls.append((actor, unit))
        outcome = self.run(actor, unit)
        if outcome == "won":
            self.queue.succeed(actor, unit, was_captured=True)
            self.captured.append(unit)
            return
        if outcome == "lost":
            verdict = self.queue.lose(actor)
            free_at[actor] = now + self.reload_seconds
        elif outcome == "outside":
            verdict = self.queue.fail_outside(actor, unit, now=now)
        else:
            verdict = self.queue.fail(actor, unit)
        if verdict.set_aside:
            self.set_aside.append(verdict)
        if verdict.give_up:
            self.gave_up_at = now
        if verdict.restart_actor:
            self.queue.remove(actor)
            self.restarts[actor] = self.restarts.get(actor, 0) + 1
            free_at[actor] = now + self.reload_seconds


def simulate(num_units: int, num_actors: int, run: Callable[[int, int], str], **options: object) -> Simulation:
    simulation = Simulation(UnitQueue(range(num_units), QueueLimits()), range(num_actors), run, **options)  # type: ignore[arg-type]
    simulation.play()
    return simulation


@pytest.mark.parametrize("slowness", [1, 5, 40])
def test_poisoned_actor_among_four_costs_no_unit(slowness: int) -> None:
    played = simulate(
        200,
        4,
        lambda actor, unit: "failed" if actor == 0 else "won",
        turns_per_unit=dict.fromkeys((1, 2, 3), slowness),
    )
    assert sorted(played.captured) == list(range(200))
    assert (played.set_aside, played.gave_up_at) == ([], None)
    assert played.restarts.keys() == {0}


def test_actor_that_a_restart_heals_is_restarted_once() -> None:
    calls_of_the_sick = []

    def run(actor: int, unit: int) -> str:
        calls_of_the_sick.extend([unit] if actor == 0 else [])
        return "failed" if actor == 0 and len(calls_of_the_sick) <= 2 else "won"

    played = simulate(100, 4, run)
    assert sorted(played.captured) == list(range(100))
    assert played.restarts == {0: 1}
    assert len(calls_of_the_sick) > 10


@pytest.mark.parametrize("num_actors", [1, 2, 4])
def test_unit_that_always_fails_is_set_aside_after_three_failures_that_count(num_actors: int) -> None:
    played = simulate(30, num_actors, lambda actor, unit: "failed" if unit == 17 else "won")
    assert [(verdict.unit, verdict.attempts) for verdict in played.set_aside] == [(17, 3)]
    assert sorted(played.captured) == [unit for unit in range(30) if unit != 17]
    assert played.gave_up_at is None


def test_failure_repeated_without_success_or_restart_between_counts_once() -> None:
    queue = UnitQueue([5, 6], QueueLimits(failures_in_a_row=10))
    queue.admit(0)
    assert queue.take(0, now=0) == 5
    assert queue.fail(0, 5).attempts == 1
    assert [queue.take(0, now=0, ahead=2) for _ in range(2)] == [6, 5]
    assert queue.fail(0, 5).attempts == 1
    queue.succeed(0, 6, was_captured=True)
    assert queue.take(0, now=0) == 5
    assert queue.fail(0, 5).attempts == 2
    queue.remove(0)
    queue.admit(0)
    assert queue.take(0, now=0) == 5
    assert queue.fail(0, 5) == Verdict(unit=5, attempts=3, set_aside=True)


@pytest.mark.parametrize("num_actors", [1, 4])
def test_capture_in_which_everything_fails_is_given_up_after_ten_units(num_actors: int) -> None:
    played = simulate(1000, num_actors, lambda actor, unit: "failed")
    assert played.gave_up_at is not None
    assert played.captured == played.set_aside == []
    assert 10 <= len({unit for _, unit in played.calls}) <= 10 + num_actors


def test_capture_with_an_actor_still_at_work_on_its_first_unit_is_not_given_up() -> None:
    played = simulate(40, 2, lambda actor, unit: "failed" if actor == 0 else "won", turns_per_unit={1: 200})
    assert played.gave_up_at is None
    assert sorted(played.captured) == list(range(40))


def test_ten_failing_units_after_a_success_do_not_end_the_capture() -> None:
    played = simulate(40, 2, lambda actor, unit: "failed" if unit >= 20 else "won")
    assert played.gave_up_at is None
    assert sorted(verdict.unit or 0 for verdict in played.set_aside) == list(range(20, 40))


def test_permanent_outside_failure_of_one_unit_is_set_aside_while_others_go_well() -> None:
    played = simulate(400, 2, lambda actor, unit: "outside" if unit == 3 else "won")
    assert [(verdict.unit, verdict.attempts) for verdict in played.set_aside] == [(3, 8)]
    assert played.calls.count((0, 3)) + played.calls.count((1, 3)) == 8
    assert len(played.captured) == 399
    assert played.gave_up_at is None


def test_outage_that_passes_costs_no_unit() -> None:
    calls = []

    def run(actor: int, unit: int) -> str:
        calls.append(unit)
        return "outside" if 20 < len(calls) < 60 else "won"

    played = simulate(100, 3, run)
    assert sorted(played.captured) == list(range(100))
    assert (played.set_aside, played.gave_up_at) == ([], None)


def test_outage_that_stays_ends_the_capture_after_the_patience_and_sets_nothing_aside() -> None:
    calls = []

    def run(actor: int, unit: int) -> str:
        calls.append(unit)
        return "outside" if len(calls) > 20 else "won"

    played = simulate(100, 3, run)
    assert played.set_aside == []
    assert played.gave_up_at is not None
    assert 120 <= played.gave_up_at < 200


def test_outside_failures_of_one_unit_do_not_end_a_capture_whose_other_actor_is_at_work() -> None:
    played = simulate(
        3, 2, lambda actor, unit: "outside" if unit == 0 and actor == 0 else "won", turns_per_unit={1: 1000}
    )
    assert sorted(played.captured) == [0, 1, 2]
    assert (played.set_aside, played.gave_up_at) == ([], None)


def test_killer_unit_is_set_aside_after_six_losses_and_costs_no_other_unit() -> None:
    played = simulate(50, 3, lambda actor, unit: "lost" if unit == 7 else "won")
    assert [(verdict.unit, verdict.attempts) for verdict in played.set_aside] == [(7, 6)]
    assert sorted(played.captured) == [unit for unit in range(50) if unit != 7]


def test_loss_counts_against_the_running_unit_only_and_gives_all_back_in_order() -> None:
    queue = UnitQueue(range(5), QueueLimits())
    queue.admit(0)
    assert [queue.take(0, now=0, ahead=3) for _ in range(4)] == [0, 1, 2, None]
    queue.succeed(0, 0, was_captured=True)
    verdict = queue.lose(0)
    assert (verdict.unit, verdict.attempts, verdict.set_aside) == (1, 1, False)
    assert queue.take(0, now=0) is None
    queue.admit(0)
    assert [queue.take(0, now=0, ahead=9) for _ in range(5)] == [1, 2, 3, 4, None]


def test_loss_of_an_idle_actor_counts_against_nobody() -> None:
    queue = UnitQueue([0], QueueLimits(losses=1))
    assert queue.lose(3) == Verdict(unit=None)
    assert queue.has_units


def test_spare_actors_go_only_when_all_units_are_in_proven_hands() -> None:
    queue = UnitQueue(range(3), QueueLimits())
    for actor in (0, 1, 2):
        queue.admit(actor)
    assert [queue.take(0, now=0), queue.find_spare([0, 1, 2])] == [0, []]
    queue.succeed(0, 0, was_captured=True)
    assert [queue.take(1, now=0), queue.take(1, now=0, ahead=2)] == [1, 2]
    assert queue.find_spare([0, 1, 2]) == [2]  # 1 has proven nothing yet: 0, which has, stays
    queue.succeed(1, 1, was_captured=True)
    assert sorted(queue.find_spare([0, 1, 2])) == [0, 2]


def test_queue_without_units_in_flight_has_no_spare_actors() -> None:
    queue = UnitQueue([], QueueLimits())
    queue.admit(0)
    assert queue.find_spare([0]) == []
    assert not queue.has_units
