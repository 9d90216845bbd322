"""What a capture shows of itself: a bar on a terminal, lines in a log, and nothing where nobody wants it."""

from __future__ import annotations

import io
import logging

import pytest
from made_up_receipts import build_receipt
from rich.console import Console

from cluster import figures as figures_module
from cluster import progress as progress_module
from cluster.figures import CaptureFigures
from cluster.progress import CaptureProgress, describe_figures, describe_seconds
from logitstore.store.commit import Outcome


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (figures_module, progress_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def figures(clock: Clock) -> CaptureFigures:
    """A capture of ten units, two of them done before: one is captured in ten seconds after a minute of loading."""
    figures = CaptureFigures(actors_wanted=4, started=clock.now)
    figures.observe()
    clock.now += 60.0
    figures.units_planned, figures.units_before, figures.phase = 10, 2, "capturing"
    figures.actors_ready, figures.units_in_flight = 3, 5
    figures.observe()
    clock.now += 10.0
    figures.count_receipt(build_receipt(empty=1))
    return figures


def test_line_tells_pace_of_late_time_left_and_who_is_at_work(figures: CaptureFigures) -> None:
    assert describe_figures(figures) == (
        "3/10 units, 10 positions/s, 1 min 10 s left, 3/4 actors, 5 units in flight, 1 dead letter"
    )


def test_line_names_every_kind_of_trouble(figures: CaptureFigures) -> None:
    figures.failures, figures.actor_losses, figures.actor_hangs, figures.quarantined = 2, 2, 1, 3
    assert describe_figures(figures).endswith("1 dead letter, 2 failures, 2 lost actors, 1 hanging actor, 3 set aside")


def test_line_names_units_that_were_found_committed(figures: CaptureFigures) -> None:
    figures.count_receipt(build_receipt(Outcome.LOST))
    assert describe_figures(figures).endswith("5 units in flight, 1 unit found committed, 1 dead letter")


def test_line_while_a_teacher_loads_tells_who_has_loaded(clock: Clock) -> None:
    assert describe_figures(CaptureFigures(actors_ready=1, actors_wanted=3)) == "loading the teacher, 1/3 actors"


def test_line_at_the_end_has_no_time_left(figures: CaptureFigures) -> None:
    figures.units_planned, figures.phase = 3, "finishing"
    assert describe_figures(figures) == "3/3 units, 10 positions/s, writing the manifest"


def test_units_that_others_committed_count_for_the_time_left_and_not_for_the_positions(figures: CaptureFigures) -> None:
    figures.count_receipt(build_receipt(Outcome.LOST))
    assert (figures.units_done, figures.positions, figures.dead_letter_counts) == (4, 100, {"empty": 1})
    assert figures.seconds_left == pytest.approx(6 / 0.2)


def test_log_gets_a_line_every_15_seconds_at_first_and_every_minute_later(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    figures = CaptureFigures(started=clock.now)
    told = []
    with caplog.at_level(logging.INFO, "logitstore.capture"), CaptureProgress(figures) as progress:
        for second in range(900):
            progress.update()
            if caplog.records:
                told.append(second)
                caplog.clear()
            clock.now += 1.0
    assert told == [*range(15, 301, 15), *range(360, 900, 60)]


def test_terminal_gets_a_bar_above_the_same_figures_and_no_lines(
    figures: CaptureFigures, caplog: pytest.LogCaptureFixture
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    with caplog.at_level(logging.INFO, "logitstore.capture"):
        with CaptureProgress(figures, console=console) as progress:
            progress.update()
    shown = screen.getvalue()
    assert "━━━" in shown  # on a terminal of 80 columns there is room for the bar, too
    assert " 3/10 " in shown
    assert "10 positions/s, 1 min 10 s left, 3/4 actors, 5 units in flight, 1 dead letter" in shown
    assert not caplog.records


def test_quiet_capture_shows_nothing(clock: Clock, figures: CaptureFigures, caplog: pytest.LogCaptureFixture) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True)
    with caplog.at_level(logging.INFO), CaptureProgress(figures, console=console, quiet=True) as progress:
        clock.now += 100.0
        progress.update()
    assert (screen.getvalue(), caplog.records) == ("", [])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599.9, "1 h 0 min"),
        (7265.0, "2 h 1 min"),
        (90_000.0, "1 d 1 h"),
    ],
)
def test_time_is_told_in_its_two_largest_units(seconds: float, text: str) -> None:
    assert describe_seconds(seconds) == text
