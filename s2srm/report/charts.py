"""Line charts as inline SVG. Colours are CSS classes, so that the page can be light or dark.

Left out: everything but lines. matplotlib's SVG has fixed colours and is twenty times the size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 360.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 12.0, 10.0, 26.0
_MAX_POINTS = 400
NUM_COLOURS = 6


@dataclass(frozen=True)
class Series:
    """One line; colour is an index below NUM_COLOURS."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: int


def line_chart(title: str, series: Sequence[Series]) -> str:
    """An <svg> element with axes, grid and one line per series; one point becomes a dot.

    ValueError if no series has a point.
    """
    lines = [_thin(s) for s in series if s.steps]
    if not lines:
        raise ValueError(f"chart {title!r} has no points")
    xs = [x for s in lines for x in s.steps]
    ys = [y for s in lines for y in s.values]
    x_ticks, y_ticks = nice_ticks(min(xs), max(xs)), nice_ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def place(x: float, y: float) -> tuple[float, float]:
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        return (
            _LEFT + (x - x_low) / (x_high - x_low) * (right - _LEFT),
            bottom - (y - y_low) / (y_high - y_low) * (bottom - _TOP),
        )

    parts = [
        f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img">',
        f"<title>{escape(title)}</title>",
    ]
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    for tick in x_ticks:
        # Steps are whole numbers.
        if x_low <= tick <= x_high and tick == round(tick):
            x, _ = place(tick, y_low)
            parts.append(
                f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{_number(tick)}</text>'
            )
    for line in lines:
        points = [place(x, y) for x, y in zip(line.steps, line.values, strict=True)]
        if len(points) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline class="line c{line.colour}" points="{path}"/>')
        if len(points) <= 12:
            parts += [
                f'<circle class="dot c{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.6">'
                f"<title>{escape(line.label)}: {_number(value)} at {_number(step)}</title></circle>"
                for (x, y), step, value in zip(points, line.steps, line.values, strict=True)
            ]
    return "".join([*parts, "</svg>"])


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers (1, 2, 2.5, 5 times a power of ten) that enclose [low, high]."""
    if low == high:
        pad = abs(low) * 0.5 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _thin(series: Series) -> Series:
    """At most _MAX_POINTS points, means of equal runs of them, so that nothing is hidden."""
    width = math.ceil(len(series.steps) / _MAX_POINTS)
    if width == 1:
        return series
    starts = range(0, len(series.steps), width)

    def means(values: Sequence[float]) -> list[float]:
        return [sum(values[i : i + width]) / len(values[i : i + width]) for i in starts]

    return Series(series.label, means(series.steps), means(series.values), series.colour)


def _number(value: float) -> str:
    """Short text of a tick."""
    if value == 0:
        return "0"
    if abs(value) >= 10000 or abs(value) < 0.001:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"
