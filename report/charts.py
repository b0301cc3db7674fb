"""Line charts as plain SVG, which takes its colours from the page around it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 340, 190  # of the drawing, in units of its own: the page decides how large it is
LEFT, RIGHT, TOP, FOOT = 44, 10, 10, 22  # room for the axes' numbers


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """About as many round numbers as wanted from low to high."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number of an axis: 20000 as 20k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


def lines(title: str, curves: Mapping[str, Sequence[tuple[float, float]]], order: list[str]) -> str:
    """One chart: a curve of (x, y) for each name.

    Args:
        order: all names of the page; the place in it decides a curve's colour and dashes.
    Returns:
        an <svg>; of curves without a point an empty string.
    """
    xs = [x for curve in curves.values() for x, _ in curve]
    ys = [y for curve in curves.values() for _, y in curve]
    if not xs:
        return ""
    x0, x1 = min(0.0, *xs), max(xs)
    low, high = min(ys), max(ys)
    if low > 0 and low < 0.7 * high:
        low = 0.0  # from zero, where that costs little of the height
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = (low if low == 0 else low - pad), high + pad

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x0) / ((x1 - x0) or 1.0)
        up = (y - low) / (high - low)
        return (LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - FOOT - up * (HEIGHT - TOP - FOOT))

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
    ]
    for value in ticks(low, high):
        y = place(x0, value)[1]
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" class="end">{short(value)}</text>')
    for value in ticks(x0, x1):
        x = place(value, low)[0]
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" class="{anchor}">{short(value)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - FOOT}H{WIDTH - RIGHT}"/>')
    for name, curve in curves.items():
        if not curve:
            continue
        points = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in curve)
        last = f"{escape(name)}: {curve[-1][1]:.4g} at {curve[-1][0]:.0f}"
        style = f'class="line c{order.index(name) % 8}"'
        if len(curve) == 1:
            x, y = place(*curve[0])
            parts.append(f'<circle {style} cx="{x:.1f}" cy="{y:.1f}" r="3">')
            parts.append(f"<title>{last}</title></circle>")
        else:
            parts.append(f'<polyline {style} points="{points}"><title>{last}</title></polyline>')
    return "\n".join([*parts, "</svg>"])
