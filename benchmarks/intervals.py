"""Means with their intervals, one a line, as an SVG file of its own."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank.compare.student import Estimate
from lowrank.report.curves import labels, span, ticks
from lowrank.report.svg import FONT, PAPER, Frame, ground, safe, text

WIDTH, LINE, TOP = 720, 26, 52
Row = tuple[str, Sequence[float], Estimate]  # name, the single values, their mean


def drawn(rows: Sequence[Row], *, title: str, label: str) -> str:
    """Each row's values as small dots, its mean as a large one on the line of its interval. An interval wider than all
    values together, as that of two seeds is, runs out of the picture."""
    values = [value for _, found, _ in rows for value in found]
    low, high = span(values, margin=0.25)
    left, bottom = 30 + 6.6 * max(len(name) for name, *_ in rows), TOP + LINE * len(rows)
    frame = Frame(left, WIDTH - 24, TOP, bottom, (low, 0.0), (high, 1.0))
    marks = ticks(low, high, about=6)
    parts = [
        ground(WIDTH, bottom + 48, PAPER),
        text(16, 26, title, PAPER.ink, 'font-size="14" font-weight="600"'),
        *(grid(frame.x(at), told, bottom) for at, told in zip(marks, labels(marks), strict=True)),
        text((left + WIDTH) / 2, bottom + 38, label, PAPER.muted, 'text-anchor="middle"'),
        *(line(frame, TOP + LINE * (place + 0.5), row) for place, row in enumerate(rows)),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 48}" width="{WIDTH}" '
        f'height="{bottom + 48}" role="img" aria-label="{safe(title)}" font-family="{FONT}" font-size="12">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def grid(x: float, told: str, bottom: float) -> str:
    rule = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom:.1f}" stroke="{PAPER.grid}"/>'
    return rule + text(x, bottom + 17, told, PAPER.muted, 'text-anchor="middle"')


def line(frame: Frame, y: float, row: Row) -> str:
    name, values, mean = row
    hue, dots = PAPER.hues[0], ""
    for value in values:
        dots += f'<circle cx="{frame.x(value):.1f}" cy="{y:.1f}" r="2.5" fill="{PAPER.muted}" fill-opacity=".6"/>'
    if mean.low is not None and mean.high is not None:
        ends = [min(max(frame.x(end), frame.left), frame.right) for end in (mean.low, mean.high)]
        dots += (
            f'<line x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{hue}" stroke-width="2"/>'
        )
    told = f"{name}: {mean.mean:.4f}"
    return (
        text(frame.left - 12, y + 4, name, PAPER.ink, 'text-anchor="end"')
        + dots
        + f'<circle cx="{frame.x(mean.mean):.1f}" cy="{y:.1f}" r="4.5" fill="{hue}">'
        + f"<title>{safe(told)}</title></circle>"
    )
