"""Bar charts as SVG files that follow the reader's light or dark colours.

Left out: everything but horizontal bars with one reference line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

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
