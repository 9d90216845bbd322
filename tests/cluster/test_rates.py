"""Rates of a capture: of late, however fast its units are, and never for want of a unit that ended before."""

from __future__ import annotations

import pytest

from cluster.rates import WINDOW_SECONDS, WINDOW_UNITS, RateWindow


def run(window: RateWindow, *, start: float, stop: float, units_per_second: float, units: int = 0) -> int:
    """Units of 10 positions that end evenly from one time to another; returns how many have ended."""
    for n in range(1, int((stop - start) * units_per_second) + 1):
        units += 1
        window.add(time=start + n / units_per_second, units=units, positions=10 * units)
    return units


def test_nothing_is_known_before_a_unit_has_ended() -> None:
    window = RateWindow()
    assert window.compute(time=0.0, units=0, positions=0) is None
    window.add(time=0.0, units=0, positions=0)
    assert window.compute(time=50.0, units=0, positions=0) is None
    rates = window.compute(time=50.0, units=1, positions=10)
    assert rates is not None
    assert (rates.units, rates.positions) == (1 / 50, 10 / 50)


@pytest.mark.parametrize("units_per_second", [0.05, 1.0, 200.0])
def test_even_pace_is_told_at_any_speed(units_per_second: float) -> None:
    window = RateWindow()
    window.add(time=0.0, units=0, positions=0)
    units = run(window, start=0.0, stop=2000.0, units_per_second=units_per_second)
    rates = window.compute(time=2000.0, units=units, positions=10 * units)
    assert rates is not None
    assert rates.units == pytest.approx(units_per_second, rel=0.05)
    assert rates.positions == pytest.approx(10 * units_per_second, rel=0.05)


def test_change_of_pace_is_told_within_the_window_and_not_smeared_over_the_whole_run() -> None:
    window = RateWindow()
    window.add(time=0.0, units=0, positions=0)
    units = run(window, start=0.0, stop=10_000.0, units_per_second=1.0)
    stop = 10_000.0 + WINDOW_SECONDS + 2
    units = run(window, start=10_000.0, stop=stop, units_per_second=8.0, units=units)
    rates = window.compute(time=stop, units=units, positions=10 * units)
    assert rates is not None
    assert rates.units == pytest.approx(8.0, rel=0.05)


def test_stall_lets_the_rates_fall_from_moment_to_moment() -> None:
    window = RateWindow()
    window.add(time=0.0, units=0, positions=0)
    units = run(window, start=0.0, stop=1000.0, units_per_second=1.0)
    told = [window.compute(time=time, units=units, positions=10 * units) for time in (1000.0, 1120.0, 2000.0)]
    rates = [one.units for one in told if one is not None]
    assert rates[0] == pytest.approx(1.0, rel=0.05)
    assert rates[1] == pytest.approx(0.5, rel=0.05)
    assert rates[2] < 0.15


def test_window_keeps_few_samples_however_many_units_end() -> None:
    window = RateWindow()
    window.add(time=0.0, units=0, positions=0)
    units = run(window, start=0.0, stop=1000.0, units_per_second=100.0)
    run(window, start=1000.0, stop=50_000.0, units_per_second=0.01, units=units)
    assert len(window._samples) <= WINDOW_SECONDS + WINDOW_UNITS
