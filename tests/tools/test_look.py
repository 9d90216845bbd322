"""Numbers, bars and names as people read them."""

from __future__ import annotations

import pytest

from tools import look
from tools.record_text import find_style
from tools.visible_text import make_visible


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_499, "999 kB"), (999_600, "1 MB"), (1_234_567, "1.23 MB"),
     (5e15, "5 PB"), (5e18, "5e+03 PB")],
)  # fmt: skip
def test_format_bytes_keeps_three_digits(num_bytes: float, text: str) -> None:
    assert look.format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (8.26, "8.3 s"), (59.4, "59 s"), (250, "4 min 10 s"), (3599.9, "59 min 59 s"),
     (11_100, "3 h 5 min"), (12.25 * 86_400, "12 d 6 h")],
)  # fmt: skip
def test_format_seconds_names_the_two_largest_units(seconds: float, text: str) -> None:
    assert look.format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0%"), (1e-9, "<0.1%"), (0.0005, "0.1%"), (0.5, "50.0%"), (1.0, "100.0%")]
)
def test_format_share_tells_little_from_nothing(share: float, text: str) -> None:
    assert look.format_share(share) == text


@pytest.mark.parametrize(("share", "bar"), [(0, ""), (1e-9, "▏"), (0.5, "██"), (0.53, "██▏"), (1, "████"), (2, "████")])
def test_draw_bar_is_as_long_as_its_share(share: float, bar: str) -> None:
    assert look.draw_bar(share, 4) == bar
    assert look.draw_bar(share, 4, rest="░") == bar + "░" * (4 - len(bar))


@pytest.mark.parametrize(("count", "text"), [(0, "0 units"), (1, "1 unit"), (1000, "1,000 units")])
def test_count_things_agrees_in_number(count: int, text: str) -> None:
    assert look.count_things(count, "unit") == text


@pytest.mark.parametrize(
    ("text", "line", "lines"),
    [("a\x1b[31mb\n", "a\\x1b[31mb\\n", "a\\x1b[31mb\n"), ("naïve\u2028", "naïve\\u2028", "naïve\\u2028")],
)
def test_make_visible_leaves_nothing_that_steers_a_terminal(text: str, line: str, lines: str) -> None:
    assert make_visible(text) == line
    assert make_visible(text, keep_lines=True) == lines


def test_names_from_elsewhere_steer_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name = "teacher\x1b[2J\u202e"
    look.print_result(look.build_facts([("teacher", name)]), look.build_table(None, ["teacher"], [[name]]))
    look.print_error(name)
    found = capsys.readouterr()
    assert "\x1b" not in found.out + found.err
    assert (found.out + found.err).count("teacher\\x1b[2J\\u202e") == 3


def test_find_style_of_growing_entropy_passes_every_colour_once() -> None:
    styles = [find_style(entropy / 10) for entropy in range(80)]
    assert len(dict.fromkeys(styles)) == 5
    assert sorted(styles, key=list(dict.fromkeys(styles)).index) == styles
