"""Bar charts as SVG files that follow the reader's light or dark colours.

Left out: everything but horizontal bars with one reference line, and points whose horizontal axis
is logarithmic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import log

_WIDTH, _LABEL, _RIGHT, _BAR, _GAP, _TOP = 720.0, 190.0, 70.0, 14.0, 4.0, 44.0
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.t{font-weight:600}.n{fill:#666}"
    ".o{fill:#2563eb}.p{fill:#9ca3af}.l{stroke:#dc2626;stroke-dasharray:4 3}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.n{fill:#999}.o{fill:#60a5fa}.p{fill:#6b7280}}"
)


@dataclass(frozen=True)
class Bar:
    """One bar; ours is drawn in the accent colour."""

    label: str
    value: float
    ours: bool


def bar_chart(
    title: str, groups: Sequence[tuple[str, Sequence[Bar]]], line: float, unit: str
) -> str:
    """An SVG document with the bars of each group under its name and a line at `line`.

    Values above eight times the line are cut there, and say so. ValueError without a bar.
    """
    values = [bar.value for _, bars in groups for bar in bars]
    if not values:
        raise ValueError(f"chart {title!r} has no bars")
    top = min(max(*values, line), 8 * line)
    scale = (_WIDTH - _LABEL - _RIGHT) / top
    parts: list[str] = []
    y = _TOP
    for name, bars in groups:
        parts.append(f'<text class="n" x="8" y="{y + 11:.0f}">{escape(name)}</text>')
        y += _BAR + _GAP
        for bar in bars:
            width = min(bar.value, top) * scale
            cut = " (cut)" if bar.value > top else ""
            parts.append(
                f'<text x="{_LABEL - 6:.0f}" y="{y + 11:.0f}" text-anchor="end">'
                f"{escape(bar.label)}</text>"
                f'<rect class="{"o" if bar.ours else "p"}" x="{_LABEL:.0f}" y="{y:.0f}"'
                f' width="{width:.1f}" height="{_BAR:.0f}"/>'
                f'<text class="n" x="{_LABEL + width + 5:.1f}" y="{y + 11:.0f}">'
                f"{bar.value:.2f}{cut}</text>"
            )
            y += _BAR + _GAP
        y += 2 * _GAP
    x = _LABEL + line * scale
    return "".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {y:.0f}"',
            f' width="{_WIDTH:.0f}" role="img"><title>{escape(title)}</title>',
            f"<style>{_STYLE}</style>",
            f'<text class="t" x="8" y="18">{escape(title)}</text>',
            f'<text class="n" x="{x + 4:.1f}" y="{_TOP - 8:.0f}">{escape(unit)}</text>',
            f'<line class="l" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 16:.0f}" y2="{y:.0f}"/>',
            *parts,
            "</svg>\n",
        ]
    )


@dataclass(frozen=True)
class Point:
    """One point; those of ours are joined by a line from left to right."""

    label: str
    x: float
    y: float
    ours: bool


def curve_chart(title: str, points: Sequence[Point], x_unit: str, y_unit: str) -> str:
    """An SVG document with points at (log x, y), y from 0. ValueError without one whose x > 0."""
    shown = sorted((p for p in points if p.x > 0), key=lambda p: (p.x, p.y, p.label))
    if not shown:
        raise ValueError(f"chart {title!r} has no points")
    left, bottom, height = 60.0, 360.0, 300.0
    low, high = log(shown[0].x), log(shown[-1].x)
    x_scale = (_WIDTH - left - 2 * _RIGHT) / max(high - low, 1e-9)
    y_scale = height / max(p.y for p in shown)
    places = [(left + (log(p.x) - low) * x_scale, bottom - p.y * y_scale, p) for p in shown]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, p in places if p.ours)
    marks = [
        f'<circle class="{"o" if p.ours else "p"}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
        f'<text class="n" x="{x + 6:.1f}" y="{y - 6:.1f}">{escape(p.label)}: {p.x:.0f}, {p.y:.2f}'
        "</text>"
        for x, y, p in places
    ]
    return "".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {bottom + 40:.0f}"',
            f' width="{_WIDTH:.0f}" role="img"><title>{escape(title)}</title>',
            f"<style>{_STYLE}</style>",
            f'<text class="t" x="8" y="18">{escape(title)}</text>',
            f'<text class="n" x="8" y="{_TOP - 4:.0f}">{escape(y_unit)}</text>',
            f'<text class="n" x="{left:.0f}" y="{bottom + 24:.0f}">{escape(x_unit)}, logarithmic',
            "</text>",
            f'<polyline class="l" fill="none" points="{path}"/>',
            *marks,
            "</svg>\n",
        ]
    )
