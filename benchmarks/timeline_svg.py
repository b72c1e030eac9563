"""A timeline as SVG: lanes with bars over seconds, and marks across all of them."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

_WIDTH, _LEFT, _LANE, _BAR = 1000, 150, 34, 22
_COLOURS = ("#4878a8", "#c8813c", "#6a9a58", "#9a6a9a")

#: Name, and bars from and to.
Lane = tuple[str, Sequence[tuple[float, float]]]


def svg(title: str, lanes: Sequence[Lane], marks: Sequence[tuple[str, float]]) -> str:
    """The axis is in milliseconds and ends behind the last mark or bar."""
    end = max([at for _, at in marks] + [bar[1] for _, bars in lanes for bar in bars]) * 1.02
    bottom = 60 + _LANE * len(lanes)

    def x(seconds: float) -> float:
        return round(_LEFT + seconds / end * (_WIDTH - _LEFT - 20), 2)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{bottom + 40}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{bottom + 40}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for tick in range(0, int(end * 1000) + 1, _step(end)):
        lines.append(f'<line x1="{x(tick / 1000)}" x2="{x(tick / 1000)}" y1="50" y2="{bottom}" stroke="#ddd"/>')
        lines.append(f'<text x="{x(tick / 1000)}" y="{bottom + 16}" text-anchor="middle">{tick} ms</text>')
    for number, (name, bars) in enumerate(lanes):
        top = 55 + _LANE * number
        lines.append(f'<text x="{_LEFT - 10}" y="{top + 15}" text-anchor="end">{escape(name)}</text>')
        for start, stop in bars:
            size = f'width="{max(1.0, round(x(stop) - x(start), 2))}" height="{_BAR}"'
            colour = _COLOURS[number % len(_COLOURS)]
            lines.append(f'<rect x="{x(start)}" y="{top}" {size} fill="{colour}" stroke="white" stroke-width="0.5"/>')
    for number, (name, at) in enumerate(marks):
        y = 34 + 12 * (number % 2)
        lines.append(f'<line x1="{x(at)}" x2="{x(at)}" y1="{y + 2}" y2="{bottom}" stroke="#b03030"/>')
        lines.append(f'<text x="{x(at) - 4}" y="{y}" text-anchor="end" fill="#b03030">{escape(name)}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _step(seconds: float) -> int:
    """Milliseconds between ticks: 1, 2 or 5 times a power of ten, ten ticks or a few more."""
    step = 1
    while seconds * 1000 / step > 14:
        step = step * 5 // 2 if str(step)[0] == "2" else step * 2
    return step
