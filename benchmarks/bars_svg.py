"""Bars as SVG: panels side by side, in each a row of two bars over one another for each name, on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_PANEL, _LEFT, _ROW, _COLUMNS = 470, 170, 34, 2
_COLOURS = ("#4878a8", "#c8813c")


@dataclass(frozen=True)
class Panel:
    title: str
    #: Name and two values above 0, the second of which is the larger one.
    rows: Sequence[tuple[str, tuple[float, float]]]


def svg(title: str, panels: Sequence[Panel]) -> str:
    """All panels have one axis."""
    values = [value for panel in panels for _, pair in panel.rows for value in pair]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    height = 50 + _ROW * max(len(panel.rows) for panel in panels)
    rows = -(-len(panels) // _COLUMNS)
    size = f'width="{_PANEL * _COLUMNS}" height="{40 + height * rows}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        f'<rect {size} fill="white"/>',
        f'<text x="10" y="20" font-size="14">{escape(title)}</text>',
    ]
    for number, panel in enumerate(panels):
        at = (_PANEL * (number % _COLUMNS), 40 + height * (number // _COLUMNS))
        lines += _panel(panel, at, low, max(high, low + 1))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _panel(panel: Panel, at: tuple[int, int], low: int, high: int) -> list[str]:
    left, top = at[0] + _LEFT, at[1] + 20
    bottom = top + _ROW * len(panel.rows)

    def width(value: float) -> float:
        return round((math.log10(value) - low) / (high - low) * (_PANEL - _LEFT - 60), 1)

    lines = [f'<text x="{left}" y="{top - 6}" font-weight="bold">{escape(panel.title)}</text>']
    for power in range(low, high + 1):
        x = left + width(10.0**power)
        lines.append(f'<line x1="{x}" x2="{x}" y1="{top}" y2="{bottom}" stroke="#ddd"/>')
        lines.append(f'<text x="{x}" y="{bottom + 14}" text-anchor="middle" fill="#666">{10.0**power:g}</text>')
    for number, (name, pair) in enumerate(panel.rows):
        y = top + _ROW * number
        lines.append(f'<text x="{left - 8}" y="{y + 20}" text-anchor="end">{escape(name)}</text>')
        for place, value in enumerate(pair):
            bar = y + 4 + 13 * place
            size = f'width="{max(1.0, width(value))}" height="11"'
            lines.append(f'<rect x="{left}" y="{bar}" {size} fill="{_COLOURS[place]}"/>')
            lines.append(f'<text x="{left + width(value) + 4}" y="{bar + 10}" font-size="10">{value:g}</text>')
    return lines
