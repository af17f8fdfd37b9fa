"""Plots for the docs, as SVG: a line through labelled points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 40, 60  # margins
Point = tuple[float, float, str]


def line_plot(points: Sequence[Point], *, title: str, x_label: str, y_label: str) -> str:
    """Draws points, joined in order, with their labels and axes of round numbers.

    Args:
        points: (x, y, label).
        title: above the plot.
        x_label: below the horizontal axis.
        y_label: beside the vertical axis.

    Returns:
        The text of an SVG file.
    """
    x_ticks, y_ticks = ticks([x for x, _, _ in points]), ticks([y for _, y, _ in points])

    def across(x: float) -> float:
        return LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM)

    middle = f"{(LEFT + WIDTH - RIGHT) / 2}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="24" text-anchor="middle" font-size="15">{escape(title)}</text>',
        f'<text x="{middle}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(18 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]
    for x in x_ticks:
        lines.append(f'<path d="M{across(x):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#ddd"/>')
        lines.append(f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>')
    for y in y_ticks:
        lines.append(f'<path d="M{LEFT} {down(y):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{down(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    path = "L".join(f"{across(x):.1f} {down(y):.1f}" for x, y, _ in points)
    lines.append(f'<path d="M{path}" fill="none" stroke="#1f6fb4" stroke-width="2"/>')
    for x, y, label in points:
        lines.append(f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="4" fill="#1f6fb4"/>')
        lines.append(f'<text x="{across(x) + 8:.1f}" y="{down(y) - 6:.1f}">{escape(label)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def ticks(values: Sequence[float]) -> list[float]:
    """Round numbers, evenly spaced, that enclose all values: 4 to 9 of them."""
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]
