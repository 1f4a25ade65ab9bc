"""Draws time series as an SVG file: panels one above the other, with vertical lines at given times.

The module writes the SVG text itself, because the base installation has no plotting library. It does not know
what the series mean.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

MIN_WIDTH: Final = 960
_LEFT, _RIGHT, _PANEL, _GAP, _TOP = 64, 810, 130, 34, 40
_LETTER: Final = 6.5
"""Width of a letter of a line's name, at most."""
_COLOURS: Final = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b")
_MARKS: Final = ("#bbbbbb", "#e377c2", "#17becf")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram of the plot, with its lines by name. The y axis starts at zero."""

    title: str
    lines: Mapping[str, Points]


def svg(
    title: str, panels: Sequence[Panel], *, length: float, unit: str = "s", marks: Mapping[str, Sequence[float]]
) -> str:
    """Returns a plot as SVG text: the panels one above the other, over a time axis from 0 to `length`. `unit`: the unit
    of all times, for the labels of the axis. `marks`: vertical lines, as label -> times."""
    longest = max((len(name) for panel in panels for name in panel.lines), default=0)
    width = max(MIN_WIDTH, math.ceil(_RIGHT + 16 + longest * _LETTER))
    height = _TOP + len(panels) * (_PANEL + _GAP) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="18" font-size="14">{escape(title)}</text>',
    ]
    for number, (kind, moments) in enumerate(marks.items()):
        colour = _MARKS[number % len(_MARKS)]
        parts.append(f'<text x="{_LEFT + 160 * number}" y="33" fill="{colour}">| {escape(kind)}</text>')
        for at in moments:
            x = _x(at, length)
            parts.append(f'<path d="M{x:.1f} {_TOP}V{height - 30}" stroke="{colour}" stroke-width="0.7"/>')
    for number, panel in enumerate(panels):
        parts += _panel(panel, _TOP + number * (_PANEL + _GAP), length, unit)
    return "\n".join([*parts, "</svg>\n"])


def _panel(panel: Panel, top: float, length: float, unit: str) -> list[str]:
    most = max((y for points in panel.lines.values() for _, y in points), default=0.0) or 1.0
    base, right = top + 14 + _PANEL - 14, _RIGHT
    parts = [
        f'<text x="{_LEFT}" y="{top + 11}" font-weight="bold">{escape(panel.title)}</text>',
        f'<path d="M{_LEFT} {top + 16}V{base}H{right}" fill="none" stroke="#444"/>',
        f'<text x="{_LEFT - 6}" y="{top + 24}" text-anchor="end">{most:.4g}</text>',
        f'<text x="{_LEFT - 6}" y="{base}" text-anchor="end">0</text>',
        f'<text x="{_LEFT}" y="{base + 13}">0 {unit}</text>',
        f'<text x="{right}" y="{base + 13}" text-anchor="end">{length:g} {unit}</text>',
    ]
    for number, (name, points) in enumerate(panel.lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(f"{_x(x, length):.1f},{base - (base - top - 18) * y / most:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.3"/>')
        parts.append(f'<text x="{right + 8}" y="{top + 26 + 14 * number}" fill="{colour}">{escape(name)}</text>')
    return parts


def _x(at: float, length: float) -> float:
    return _LEFT + (_RIGHT - _LEFT) * min(1.0, max(0.0, at / length))
