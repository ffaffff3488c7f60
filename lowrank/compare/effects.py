"""Main effects: for each key a chart of what its values did, and the heat map of two keys."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lowrank.compare import plot, shown
from lowrank.compare.explain import Effect, Level
from lowrank.compare.ranking import Ranking
from lowrank.report.figures import short
from lowrank.report.ranks import picture, pointer
from lowrank.report.svg import PAGE, Frame, text

WIDTH, HEIGHT = 346, 270
CELL, TALL, WIDEST = 60.0, 40.0, 1000.0  # pixels, of the heat map


def means(ranking: Ranking) -> list[float | None]:
    """The quality's mean of each group, in the order of ``results.groups``."""
    found = [group.estimate(ranking.quality) for group in ranking.results.groups]
    return [one.mean if one else None for one in found]


def middle(level: Level, values: Sequence[float | None]) -> float | None:
    """The median of the groups of a level: one that diverged does not move it."""
    known = [value for place in level.places if (value := values[place]) is not None]
    return statistics.median(known) if known else None


def main_effect(ranking: Ranking, effect: Effect) -> str:
    """An ``<svg>``: a dot a group at its value of the key, and each value's median, joined where they have an order."""
    values = means(ranking)
    kept, _ = plot.telling([value for value in values if value is not None], ranking.higher(ranking.quality))
    y, x = plot.linear(kept, about=7), along(effect)
    left = plot.room(y)
    bottom = HEIGHT - plot.depth(x, WIDTH - 14 - left) - 6
    frame = Frame(left, WIDTH - 14, 52, bottom, (x.low, y.low), (x.high, y.high))
    drawn = [plot.grid(frame, y), plot.below(frame, x), caption(effect)]
    middles: list[tuple[float, float]] = []
    for place, level in enumerate(effect.levels):
        xs = {one: frame.x(x.at(at(effect, place, one))) for one in level.places}
        drawn += [
            dot(frame.y(value), xs[one], value, frame) for one in level.places if (value := values[one]) is not None
        ]
        begin, end = (min(xs.values()), max(xs.values()))
        if (median := middle(level, values)) is not None:
            middles.append(((begin + end) / 2, frame.y(median)))
        width = max(end - begin, 24.0)
        said = sentence(ranking, effect, level, values)
        drawn.append(pointer((begin + end - width) / 2, frame.top, width, frame.bottom - frame.top, said))
    drawn.insert(2, joined(middles, effect.numeric))
    heading = shown.headings(ranking.keys).get(effect.key, effect.key)
    return picture(heading, WIDTH, HEIGHT, drawn, PAGE)


def along(effect: Effect) -> plot.Axis:
    """The key's axis: its values side by side, or to scale where there are many."""
    if effect.numbers is None:
        return plot.side_by_side([level.name for level in effect.levels])
    return plot.scales([value for value in effect.numbers if value is not None], short, about=5)


def at(effect: Effect, level: int, group: int) -> float:
    """What a group's place along the axis is made of: its value, or the number of its level."""
    value = effect.numbers[group] if effect.numbers else None
    return float(level) if value is None else value


def caption(effect: Effect) -> str:
    if effect.share is None:
        return ""
    return text(WIDTH - 14, 25, f"explains {effect.share * 100:.0f} %", plot.MUTED, 'text-anchor="end"')


def dot(y: float, x: float, value: float, frame: Frame) -> str:
    """A group; one beyond the axis is an open dot on its edge."""
    off = not frame.low[1] <= value <= frame.high[1]
    paint = f'fill="none" stroke="{PAGE.alarm}"' if off else f'fill="{plot.MUTED}" fill-opacity=".45"'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" {paint}/>'


def joined(middles: Sequence[tuple[float, float]], numeric: bool) -> str:
    line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in middles)
    path = f'<path d="{line}" fill="none" stroke="{plot.HUES[0]}" stroke-width="2"/>' if numeric and middles else ""
    bars = "".join(
        f'<path d="M{x - 9:.1f} {y:.1f}h18" stroke="{plot.HUES[0]}" stroke-width="3" stroke-linecap="round"/>'
        for x, y in middles
    )
    return path + bars


def sentence(ranking: Ranking, effect: Effect, level: Level, values: Sequence[float | None]) -> str:
    form = shown.formatted(ranking.quality)
    known = [value for place in level.places if (value := values[place]) is not None]
    median = middle(level, values)
    spread = f", {form(min(known))} to {form(max(known))}" if len(known) > 1 else ""
    groups = f"{len(level.places)} configuration{'s' if len(level.places) > 1 else ''}"
    return f"{effect.key}={level.name}\nmedian {form(median)}{spread}\n{groups}"


def heat_map(ranking: Ranking, across: Effect, down: Effect) -> str:
    """An ``<svg>``: a cell for each pair of values, as strong as its median is good; the best is framed."""
    values = means(ranking)
    table = [[cell_value(a, d, values) for a in across.levels] for d in down.levels]
    known = [value for row in table for value in row if value is not None]
    names = shown.headings([across.key, down.key])
    left = 30 + plot.CHARACTER * max(len(names[down.key]), *(len(level.name) for level in down.levels))
    axis = plot.side_by_side([level.name for level in across.levels])
    wide = max(CELL, min(150.0, (WIDEST - left) / len(across.levels)))
    right, bottom = left + wide * len(across.levels), 60 + TALL * len(down.levels)
    frame = Frame(left, right, 60, bottom, (axis.low, 0), (axis.high, 1))
    drawn = [
        plot.below(frame, axis, names[across.key]),
        text(left - 10, 50, names[down.key], plot.MUTED, 'text-anchor="end"'),
    ]
    best = (max if ranking.higher(ranking.quality) else min)(known, default=None)
    for y, level in enumerate(down.levels):
        top = 60 + TALL * y
        drawn.append(text(left - 10, top + TALL / 2 + 4, level.name, plot.MUTED, 'text-anchor="end"'))
        for x, column in enumerate(across.levels):
            box = (left + wide * x, top, wide)
            pair = Level("", tuple(set(column.places) & set(level.places)))
            said = f"{across.key}={column.name}\n{sentence(ranking, down, Level(level.name, pair.places), values)}"
            drawn.append(cell(ranking, table[y][x], known, box, said, table[y][x] == best))
    height = bottom + plot.depth(axis, right - left) + 24
    return picture(heat_title(ranking, names, across, down), max(round(right + 20), 460), height, drawn, PAGE)


def heat_title(ranking: Ranking, names: dict[str, str], across: Effect, down: Effect) -> str:
    return f"Median {shown.label(ranking.quality)} by {names[across.key]} and {names[down.key]}"


def cell_value(across: Level, down: Level, values: Sequence[float | None]) -> float | None:
    return middle(Level("", tuple(place for place in across.places if place in down.places)), values)


def cell(
    ranking: Ranking,
    value: float | None,
    known: Sequence[float],
    box: tuple[float, float, float],
    said: str,
    best: bool,
) -> str:
    x, y, wide = box
    size = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{wide - 2:.1f}" height="{TALL - 2:.1f}" rx="3"'
    if value is None:
        return f'<rect {size} fill="none" stroke="{plot.GRID}" stroke-dasharray="3 3"/>'
    kept, _ = plot.telling(known, ranking.higher(ranking.quality))
    strong = 0.62 * plot.strength(plot.goodness(value, kept, ranking.higher(ranking.quality)))
    frame = f' stroke="{plot.INK}" stroke-width="2"' if best else ""
    weight = 'text-anchor="middle" font-weight="600"' if best else 'text-anchor="middle"'
    written = text(x + wide / 2, y + TALL / 2 + 4, shown.formatted(ranking.quality)(value), plot.INK, weight)
    return f'<rect {size} fill="{plot.HUES[0]}" fill-opacity="{strong:.3f}"{frame}/>{written}' + pointer(
        x, y, wide, TALL, said
    )
