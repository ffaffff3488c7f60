"""Parallel coordinates: a line a group through its value of each key to its figures, as strong as it is good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lowrank.compare import plot, shown
from lowrank.compare.explain import Effect
from lowrank.compare.ranking import Ranking, Row
from lowrank.report.figures import short
from lowrank.report.ranks import picture
from lowrank.report.svg import PAGE, safe, text

WIDTH, HEIGHT, TOP = 1072, 420, 74
MOST = 8  # keys drawn


@dataclass(frozen=True)
class Upright:
    """One vertical axis: its name, its labelled heights and each row's height on it, both from 0 below to 1 above."""

    name: str
    marks: list[tuple[float, str]]
    heights: list[float | None]


def parallel(ranking: Ranking, found: Sequence[Effect]) -> str:
    """An ``<svg>``, best line last so that it lies on top."""
    order = {id(group): place for place, group in enumerate(ranking.results.groups)}
    places = [order[id(row.group)] for row in ranking.rows]
    quality = measure(ranking, ranking.quality)
    heights = quality.heights
    keys = [one for one in found if one.key in ranking.keys][:MOST]
    keys.sort(key=lambda one: ranking.keys.index(one.key))
    cost = next((cost for cost in ranking.costs if differs(ranking, cost)), None)
    axes = [upright(ranking, one, places, heights) for one in keys]
    axes += ([measure(ranking, cost)] if cost else []) + [quality]
    left, right = 26 + plot.CHARACTER * max((len(name) for _, name in axes[0].marks), default=4), WIDTH - 90.0
    xs = [left + (right - left) * place / max(1, len(axes) - 1) for place in range(len(axes))]
    letters = max(4, int((xs[1] - xs[0] - 26) / plot.CHARACTER))
    drawn = [line(ranking, row, place, axes, xs) for place, row in reversed(list(enumerate(ranking.rows)))]
    return picture(
        "Every configuration",
        WIDTH,
        HEIGHT,
        [STYLE, *drawn, *(axis(one, x, letters) for one, x in zip(axes, xs, strict=True))],
        PAGE,
    )


STYLE = (
    "<style>.lr-line{pointer-events:stroke}"
    ".lr-line:hover{stroke:var(--hue-1,#d2691e);stroke-opacity:1;stroke-width:3.5}</style>"
)


def differs(ranking: Ranking, metric: str) -> bool:
    return len({found.mean for row in ranking.rows if (found := row.estimates[metric])}) > 1


def measure(ranking: Ranking, metric: str) -> Upright:
    """A figure's axis, the better end above."""
    values = [found.mean if (found := row.estimates[metric]) else None for row in ranking.rows]
    known = [value for value in values if value is not None]
    higher = ranking.higher(metric)
    kept, _ = plot.telling(known, higher)
    made = plot.sizes(kept, metric, 6) if metric != ranking.quality else plot.linear(kept, 7)

    def height(at: float) -> float:
        share = min(max((at - made.low) / (made.high - made.low), 0.0), 1.0)
        return share if higher else 1 - share

    marks = [(height(at), name) for at, name in made.marks]
    return Upright(shown.label(metric), marks, [None if v is None else height(made.at(v)) for v in values])


def upright(ranking: Ranking, effect: Effect, places: Sequence[int], heights: Sequence[float | None]) -> Upright:
    """A key's axis: its values one above another, the lines of each fanned out by how good they are."""
    name = shown.headings(ranking.keys).get(effect.key, effect.key)
    if effect.numbers is not None:
        return scaled(name, [effect.numbers[place] for place in places])
    count = len(effect.levels)
    found: list[float | None] = [None] * len(places)
    marks = []
    for number, level in enumerate(effect.levels):
        here = [row for row, place in enumerate(places) if place in level.places]
        here.sort(key=lambda row: -1.0 if heights[row] is None else heights[row])  # type: ignore[arg-type,return-value]
        for rank, row in enumerate(here):
            inside = (rank + 0.5) / len(here) - 0.5
            found[row] = (number + 0.5 + 0.5 * inside) / count
        marks.append(((number + 0.5) / count, level.name))
    return Upright(name, marks, found)


def scaled(name: str, values: Sequence[float | None]) -> Upright:
    """Of a key with many values: to scale."""
    made = plot.scales([value for value in values if value is not None], short, about=8)

    def height(at: float) -> float:
        return (at - made.low) / (made.high - made.low)

    heights = [None if value is None else height(made.at(value)) for value in values]
    return Upright(name, [(height(at), label) for at, label in made.marks], heights)


def y(height: float) -> float:
    return HEIGHT - 22 - height * (HEIGHT - 22 - TOP)


def line(ranking: Ranking, row: Row, place: int, axes: Sequence[Upright], xs: Sequence[float]) -> str:
    points = [(x, y(height)) for x, one in zip(xs, axes, strict=True) if (height := one.heights[place]) is not None]
    if len(points) < 2:
        return ""
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (a, b), (c, d) in pairwise(points):
        bend = 0.45 * (c - a)
        path += f"C{a + bend:.1f} {b:.1f} {c - bend:.1f} {d:.1f} {c:.1f} {d:.1f}"
    good = axes[-1].heights[place]
    best = place == 0 and not ranking.choice.sort
    colour, strong = (plot.HUES[1], 1.0) if best else (plot.HUES[0], 0.85 * plot.strength((good or 0.0) ** 2))
    found = row.estimates[ranking.quality]
    form = shown.formatted(ranking.quality)
    said = f"{row.group.label(ranking.keys)}\n{shown.label(ranking.quality)} {form(found.mean if found else None)}"
    return (
        f'<path class="lr-line" d="{path}" fill="none" stroke="{colour}" stroke-opacity="{strong:.3f}" '
        f'stroke-width="{3 if best else 1.6}"><title>{safe(said)}</title></path>'
    )


def axis(one: Upright, x: float, letters: int) -> str:
    """The line, its name above, and its labels on the left, cut to so many letters."""
    halo = f'paint-order="stroke" stroke="{plot.CARD}" stroke-width="4" stroke-linejoin="round" text-anchor="end"'
    parts = [
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y(1):.1f}" y2="{y(0):.1f}" stroke="{plot.MUTED}" stroke-opacity=".6"/>',
        text(x, TOP - 22, one.name, plot.INK, 'text-anchor="middle" font-weight="600"'),
    ]
    for height, name in one.marks:
        parts.append(
            text(x - 9, y(height) + 4, name if len(name) <= letters else name[: letters - 1] + "…", plot.MUTED, halo)
        )
    return "".join(parts)
