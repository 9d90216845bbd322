"""The benchmark of the driver, on a capture small enough for a test."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from tools.benchmark import app


@pytest.mark.slow
def test_driver_of_few_units_prints_a_row_for_every_step_with_numbers_in_it() -> None:
    arguments = ["driver", "--units", "300", "--actors", "20", "--no-ray"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    lines = result.stdout.strip().splitlines()
    assert lines[0].startswith("`logitstore benchmark driver --units 300 --actors 20`, logitstore ")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0] == ["step", "seconds", "of a processor", "µs per unit", "units/s", "peak MiB", "outcome"]
    outcomes = {title: outcome for title, *_, outcome in rows[2:]}
    for title, seconds, processor_seconds, each, rate, peak, _ in rows[2:]:
        assert 0 <= float(seconds) < 60
        assert 0 <= float(processor_seconds) < 60
        assert 10 < int(peak.replace(",", "")) < 2000
        assert (each == rate == "") == title.startswith("resume")
    # One listing of commits and one of quarantine, the corpus on disk, the plan twice.
    assert outcomes["resume: command to first unit, half committed"].startswith("150 units to do; requests: 2 get")
    assert outcomes["20 actors, a look at all for each unit"].startswith("0 failures, 0 lost actors; ")
    assert len(outcomes) == 5
    assert lines[-1].startswith("By the slowest of these steps a driver's core is full with ")
