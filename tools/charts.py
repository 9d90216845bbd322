"""Line charts as inline SVG: a few kilobytes each, no script, colours from the page's style sheet."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 460, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 22, 42, 40


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart; `style` is a CSS class, such as `s0`, `s1` or `faint`."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str


def build_line_chart(title: str, x_label: str, y_label: str, lines: Sequence[Line]) -> str:
    """SVG of lines over common axes, with round tick values and a legend; the values stand in tooltips too."""
    points = [point for line in lines for point in line.points if math.isfinite(point[1])]
    if not points:
        return ""
    x_ticks = compute_ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = compute_ticks(min(y for _, y in points), max(y for _, y in points))
    parts = [_frame(title, x_label, y_label, x_ticks, y_ticks)]
    for number, line in enumerate(lines):
        parts.append(_draw_line(line, x_ticks, y_ticks))
        x = _LEFT + 8 + 110 * number
        parts.append(f'<line class="{line.style}" x1="{x}" y1="24" x2="{x + 18}" y2="24"/>')
        parts.append(f'<text class="legend" x="{x + 23}" y="28">{html.escape(line.name)}</text>')
    description = html.escape(f"{title}: {y_label} over {x_label}")
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{description}">{"".join(parts)}</svg>'


def build_bar_chart(title: str, x_label: str, y_label: str, values: Sequence[float], bin_width: float) -> str:
    """SVG of a histogram whose bins begin at 0."""
    if not values or not max(values):
        return ""
    used = max(i for i, value in enumerate(values) if value) + 1
    x_ticks, y_ticks = compute_ticks(0, used * bin_width), compute_ticks(0, max(values))
    parts = [_frame(title, x_label, y_label, x_ticks, y_ticks)]
    base = _place_y(0, y_ticks)
    for i, value in enumerate(values[:used]):
        left, right = _place_x(i * bin_width, x_ticks), _place_x((i + 1) * bin_width, x_ticks)
        top = _place_y(value, y_ticks)
        label = f"{i * bin_width:g} to {(i + 1) * bin_width:g}: {value:,.0f}"
        parts.append(
            f'<rect class="bar" x="{left + 1:.1f}" y="{top:.1f}" width="{max(1.0, right - left - 2):.1f}" '
            f'height="{base - top:.1f}"><title>{label}</title></rect>'
        )
    description = html.escape(f"{title}: {y_label} over {x_label}")
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{description}">{"".join(parts)}</svg>'


def compute_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """About `target` round values, evenly spaced, that enclose [low, high]."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / target
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _draw_line(line: Line, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> str:
    points = [(x, y) for x, y in line.points if math.isfinite(y)]
    places = [(_place_x(x, x_ticks), _place_y(y, y_ticks)) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = f'<polyline class="{line.style}" points="{path}"/>'
    if len(places) > 20:
        return drawn
    dots = [
        f'<circle class="{line.style}" cx="{px:.1f}" cy="{py:.1f}" r="3"><title>{x:g}: {y:.4g}</title></circle>'
        for (x, y), (px, py) in zip(points, places, strict=True)
    ]
    return drawn + "".join(dots)


def _frame(title: str, x_label: str, y_label: str, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> str:
    parts = [f'<text class="title" x="{_LEFT}" y="14">{html.escape(title)}</text>']
    for tick in y_ticks:
        y = _place_y(tick, y_ticks)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_format(tick)}</text>')
    for tick in x_ticks:
        x = _place_x(tick, x_ticks)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_format(tick)}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="tick" x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    height = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text class="tick" transform="translate(12 {height}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_label)}</text>"
    )
    return "".join(parts)


def _format(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _place_x(x: float, ticks: Sequence[float]) -> float:
    return _LEFT + (x - ticks[0]) / (ticks[-1] - ticks[0]) * (_WIDTH - _LEFT - _RIGHT)


def _place_y(y: float, ticks: Sequence[float]) -> float:
    return _HEIGHT - _BOTTOM - (y - ticks[0]) / (ticks[-1] - ticks[0]) * (_HEIGHT - _TOP - _BOTTOM)
