"""What the charts of many runs share: axes of numbers or of values side by side, and their drawing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowrank.report.curves import labels, span, ticks
from lowrank.report.figures import fixed, short
from lowrank.report.svg import PAGE, Frame, text

CHARACTER = 6.4  # a letter's mean width at 12 px
INK, MUTED, GRID, CARD = PAGE.ink, PAGE.muted, PAGE.grid, PAGE.ground
HUES = PAGE.hues
FAR = 3.0  # quartile distances beyond the upper quartile from which on a value is off the axis
LOGARITHMIC = 8.0  # highest over lowest from which on an axis of sizes is logarithmic


@dataclass(frozen=True)
class Axis:
    """From values to a number between ``low`` and ``high`` along the axis, and where it is labelled."""

    low: float
    high: float
    marks: list[tuple[float, str]]  # a number along the axis, its label
    at: Callable[[float], float]


def linear(values: Sequence[float], about: float, margin: float = 0.06) -> Axis:
    low, high = span(values, margin)
    found = ticks(low, high, about)
    return Axis(low, high, list(zip(found, labels(found), strict=True)), float)


def sizes(values: Sequence[float], metric: str, about: float) -> Axis:
    """Of a metric's sizes: logarithmic where they differ much; in round minutes or hours where it is a time."""
    times, name = clock(max(values)) if metric.rpartition(".")[2] == "seconds" else (1.0, "")
    unit = (lambda value: f"{value:.3g} {name}") if name else written(metric)
    made = scales([value / times for value in values], unit, about)
    return Axis(made.low, made.high, made.marks, lambda value: made.at(value / times))


def clock(seconds: float) -> tuple[float, str]:
    """The unit in which so long a time is told, in seconds, and its name."""
    return next((unit for unit in ((3600.0, "h"), (60.0, "min")) if seconds >= 2 * unit[0]), (1.0, "s"))


def scales(values: Sequence[float], unit: Callable[[float], str], about: float) -> Axis:
    low, high = min(values), max(values)
    if low <= 0 or high / low < LOGARITHMIC:
        low, high = span(values, 0.06)
        return Axis(low, high, [(value, unit(value)) for value in ticks(low, high, about)], float)
    room = 0.06 * math.log10(high / low)
    a, b = math.log10(low) - room, math.log10(high) + room
    powers = range(math.floor(a), math.ceil(b) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        marks = [f * 10.0**power for power in powers for f in factors if a <= math.log10(f * 10.0**power) <= b]
        if len(marks) <= about + 1:
            break
    return Axis(a, b, [(math.log10(value), unit(value)) for value in marks], math.log10)


def side_by_side(names: Sequence[str]) -> Axis:
    """Values without a distance: the first at 0.5, the next at 1.5 …"""
    marks = [(place + 0.5, name) for place, name in enumerate(names)]
    return Axis(0.0, float(max(len(names), 1)), marks, lambda place: place + 0.5)


def telling(values: Sequence[float], higher: bool) -> tuple[list[float], int]:
    """The values that an axis must hold, and how many bad ones lie so far off that they would flatten the rest."""
    order = sorted(values, reverse=higher)
    if len(order) < 5:
        return list(values), 0
    good, bad = order[len(order) // 4], order[3 * len(order) // 4]
    limit = bad + FAR * (bad - good)
    kept = [value for value in values if (value >= limit if higher else value <= limit)]
    lost = len(values) - len(kept)
    return (kept, lost) if 0 < lost <= len(values) // 4 else (list(values), 0)


def written(metric: str) -> Callable[[float], str]:
    """Writes a tick of a metric: ``500 k``, ``2 GB``."""
    last = metric.rpartition(".")[2]
    if last.endswith("_parameters") or last.endswith("_tokens"):
        return lambda value: scaled(value, ((1e9, " B"), (1e6, " M"), (1e3, " k")), "")
    if last in ("peak_memory_mb", "predicted_peak_memory_mb"):
        return lambda value: scaled(value, ((1e3, " GB"),), " MB")
    return short


def scaled(value: float, steps: Sequence[tuple[float, str]], rest: str) -> str:
    for size, name in steps:
        if abs(value) >= size * 0.9999:
            return f"{value / size:.3g}{name}"
    return f"{value:.3g}{rest}" if abs(value) < 1000 else f"{fixed(value)}{rest}"


def grid(frame: Frame, axis: Axis) -> str:
    """Horizontal lines with their labels on the left."""
    ends = f'x1="{frame.left:.1f}" x2="{frame.right:.1f}"'
    parts = []
    for at, name in axis.marks:
        y = frame.y(at)
        parts.append(f'<line {ends} y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>')
        parts.append(text(frame.left - 8, y + 4, name, MUTED, 'text-anchor="end"'))
    return "".join(parts)


def below(frame: Frame, axis: Axis, name: str = "") -> str:
    """The line below a plot, its labels as far as they fit side by side (turned where they do not), and its name."""
    parts = [
        f'<line x1="{frame.left:.1f}" x2="{frame.right:.1f}" y1="{frame.bottom:.1f}" y2="{frame.bottom:.1f}" '
        f'stroke="{MUTED}" stroke-opacity=".5"/>'
    ]
    turned = crowded(axis, frame.right - frame.left)
    for at, label in axis.marks:
        x, y = frame.x(at), frame.bottom + 18
        shown = label if len(label) <= 18 else label[:17] + "…"
        more = f'text-anchor="end" transform="rotate(-35 {x:.1f} {y - 4:.1f})"' if turned else 'text-anchor="middle"'
        parts.append(text(x, y, shown, MUTED, more))
    drop = depth(axis, frame.right - frame.left)
    parts.append(text((frame.left + frame.right) / 2, frame.bottom + drop + 14, name, MUTED, 'text-anchor="middle"'))
    return "".join(parts)


def crowded(axis: Axis, width: float) -> bool:
    """Whether its labels would touch."""
    if len(axis.marks) < 2:
        return False
    slot = (
        width * min(b - a for (a, _), (b, _) in zip(axis.marks, axis.marks[1:], strict=False)) / (axis.high - axis.low)
    )
    return max(len(name) for _, name in axis.marks) * CHARACTER + 8 > slot


def depth(axis: Axis, width: float) -> float:
    """The pixels that its labels take below the line."""
    longest = min(18, max((len(name) for _, name in axis.marks), default=0))
    return 14 + 0.58 * CHARACTER * longest if crowded(axis, width) else 24


def room(axis: Axis) -> float:
    """The pixels on the left that its labels take."""
    return 18 + 6.8 * max((len(name) for _, name in axis.marks), default=1)


def strength(share: float) -> float:
    """Of the one hue that tells good from bad: 1 for the best (share 1), still to be seen for the worst."""
    return 0.12 + 0.88 * min(max(share, 0.0), 1.0)


def goodness(value: float, values: Sequence[float], higher: bool) -> float:
    """0 for the worst of ``values``, 1 for the best."""
    low, high = min(values), max(values)
    share = (min(max(value, low), high) - low) / (high - low) if high > low else 1.0
    return share if higher or high == low else 1 - share
