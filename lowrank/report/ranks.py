"""How the ranks of a run's sites moved: a heat map of site by step, and the final rank of every layer's every part.

Drawn in one hue whose strength is the rank, over whatever ground there is: it reads the same on a light and on a
dark page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lowrank.report.curves import labels, ticks
from lowrank.report.figures import fixed, mapping, number
from lowrank.report.svg import FONT, PAGE, Theme, ground, safe, text

LABEL, CHARACTER = 16, 6.6  # pixels: the least room left of the labels, and a letter's width
TALLEST = 1200  # pixels, of all rows together
LONGEST = 32  # characters of a label
COLUMNS = 160  # steps drawn
GAP = 5  # between two parts


@dataclass(frozen=True)
class Site:
    path: str
    part: str  # what it is in its layer: self_attn.q_proj
    layer: int | None


@dataclass(frozen=True)
class Ranks:
    """The ranks that ``metrics.jsonl`` told of: each holds until the next step."""

    steps: list[float]
    sites: list[Site]  # by part, in each by layer
    table: list[list[float | None]]  # of each site at each step; None before anything was told of it

    @property
    def most(self) -> float:
        return max((rank for row in self.table for rank in row if rank is not None), default=0.0) or 1.0

    def parts(self) -> list[tuple[str, list[int]]]:
        """Each part with the places of its sites."""
        places = groupby(range(len(self.sites)), key=lambda place: self.sites[place].part)
        return [(part, list(of)) for part, of in places]


def ranks_of(rows: Sequence[dict[str, Any]]) -> Ranks | None:
    """What rows ``{"step": …, "ranks": {path: rank}}`` tell, a step's together; None where they tell nothing."""
    told: dict[float, dict[str, float]] = {}
    for row in rows:
        step = number(row.get("step"))
        found = {path: rank for path, value in mapping(row.get("ranks")).items() if (rank := number(value)) is not None}
        if step is not None and step >= 0 and found and min(found.values()) >= 0:
            told.setdefault(step, {}).update(found)
    if not told:
        return None
    sites = [site(path) for path in dict.fromkeys(path for found in told.values() for path in found)]
    order = {part: place for place, part in enumerate(dict.fromkeys(one.part for one in sites))}
    sites.sort(key=lambda one: (order[one.part], -1 if one.layer is None else one.layer))
    steps = sorted(told)
    drawn = sorted({place * (len(steps) - 1) // COLUMNS for place in range(COLUMNS + 1)})
    table = [list(held(one.path, steps, told)) for one in sites]
    return Ranks([steps[place] for place in drawn], sites, [[row[place] for place in drawn] for row in table])


def site(path: str) -> Site:
    """``model.layers.3.self_attn.q_proj`` is layer 3's self_attn.q_proj; without a number a part of its own."""
    names = path.split(".")
    for place, name in enumerate(names):
        if name.isascii() and name.isdigit() and len(name) < 10:
            return Site(path, ".".join(names[place + 1 :]) or ".".join(names[:place]), int(name))
    return Site(path, path, None)


def held(path: str, steps: Sequence[float], told: dict[float, dict[str, float]]) -> Iterator[float | None]:
    known: float | None = None
    for step in steps:
        known = told[step].get(path, known)
        yield known


def over_time(ranks: Ranks, last: float, width: int = 1072, theme: Theme = PAGE) -> str:
    """An ``<svg>``: a row a site, its parts one below another, each row as strong as the rank at that step.

    What was told first holds from the start, what was told last up to step ``last``.
    """
    parts = ranks.parts()
    high = min(14.0, max(3.0, 620 / len(ranks.sites)), TALLEST / len(ranks.sites))
    left = room(parts)
    top, right, end = 62.0, width - 20.0, max(last, ranks.steps[-1], 1.0)
    tops: dict[int, float] = {}
    y = top
    drawn = []
    for part, places in parts:
        tops |= {place: y + high * index for index, place in enumerate(places)}
        if (band := high * len(places)) >= 12:
            drawn.append(text(left - 8, y + band / 2 + 4, label(part), theme.muted, 'text-anchor="end"'))
        y += band + GAP
    bottom = y - GAP
    drawn += [
        cells(ranks, end, tops, high, (left, top, right - left, bottom - top), theme),
        steps_below(end, left, right, bottom, theme),
        text((left + right) / 2, bottom + 36, "step", theme.muted, 'text-anchor="middle"'),
        *(pointer(left, tops[place], right - left, high, course(ranks, place)) for place in tops),
    ]
    return picture("Rank of each site over time", width, bottom + 44, [scale(ranks.most, right, theme), *drawn], theme)


def cells(
    ranks: Ranks, end: float, tops: dict[int, float], high: float, box: tuple[float, float, float, float], theme: Theme
) -> str:
    """The heat map in a picture of its own, a unit of x being a step; one path for all cells of a rank."""
    left, top, width, height = box
    edges, down = [0.0, *ranks.steps[1:], end], short(high)
    paths: dict[float, list[str]] = {}
    for place, row in enumerate(ranks.table):
        at, y = 0, short(tops[place] - top)
        for rank, same in groupby(row):
            begin, at = at, at + len(list(same))
            if rank:
                paths.setdefault(rank, []).append(f"M{short(edges[begin])} {y}v{down}H{short(edges[at])}v-{down}z")
    shapes = (
        f'<path fill-opacity="{strength(rank, ranks.most):.3f}" d="{"".join(of)}"/>'
        for rank, of in sorted(paths.items())
    )
    return (
        f'<svg x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{theme.hues[0]}" '
        f'viewBox="0 0 {short(end)} {short(height)}" preserveAspectRatio="none" shape-rendering="crispEdges">'
        f"{''.join(shapes)}</svg>"
    )


def final(ranks: Ranks, width: int = 1072, theme: Theme = PAGE) -> str:
    """An ``<svg>`` of the last ranks: a row a part, a column a layer, the rank in each cell."""
    parts = ranks.parts()
    layers = sorted({one.layer for one in ranks.sites if one.layer is not None}) or [0]
    left = room(parts)
    wide, high, top = min(44.0, (width - 20 - left) / len(layers)), 24.0, 62.0
    column = {layer: left + wide * place for place, layer in enumerate(layers)}
    every = max(1, -(-26 // max(1, int(wide))))  # a label of three digits takes 26 pixels
    drawn = [
        text(column[layer] + wide / 2, top - 8, str(layer), theme.muted, 'text-anchor="middle"')
        for layer in layers[::every]
    ]
    for index, (part, places) in enumerate(parts):
        y = top + high * index
        drawn.append(text(left - 8, y + high / 2 + 4, label(part), theme.muted, 'text-anchor="end"'))
        for place in places:
            layer = ranks.sites[place].layer
            drawn.append(cell(ranks, place, left if layer is None else column[layer], y, wide, high, theme))
    return picture("Final rank of each site, by layer", width, top + high * len(parts) + 14, drawn, theme)


def cell(ranks: Ranks, place: int, x: float, y: float, wide: float, high: float, theme: Theme) -> str:
    rank = ranks.table[place][-1] or 0.0
    number_ = text(x + wide / 2, y + high / 2 + 4, fixed(rank), theme.ink, 'text-anchor="middle"') if wide >= 15 else ""
    ground_ = (
        f'<rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{max(wide - 2, 1):.1f}" height="{high - 2:.1f}" rx="3" '
        f'fill="{theme.hues[0]}" fill-opacity="{0.6 * strength(rank, ranks.most):.3f}"/>'
    )
    return ground_ + number_ + pointer(x, y, wide, high, course(ranks, place))


def course(ranks: Ranks, place: int) -> str:
    """``model.layers.0.mlp.up_proj``, and below it ``24 → 24 → 17`` without what did not change."""
    known = [rank for rank, _ in groupby(rank for rank in ranks.table[place] if rank is not None)]
    shown = known if len(known) < 8 else [*known[:3], *known[-4:]]
    return f"{ranks.sites[place].path}\nrank {' → '.join(fixed(rank) for rank in shown)}"


def strength(rank: float, most: float) -> float:
    """Of the hue: nothing for rank 0, and the least rank still to be seen."""
    return 0.08 + 0.92 * rank / most if rank else 0.0


def pointer(x: float, y: float, width: float, height: float, said: str) -> str:
    """An invisible rectangle that shows ``said`` under the pointer."""
    return (
        f'<rect class="lr-column" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">'
        f"<title>{safe(said)}</title></rect>"
    )


def scale(most: float, right: float, theme: Theme) -> str:
    """The legend: five strengths from 0 to the highest rank."""
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    boxes = "".join(
        f'<rect x="{right - 60 - 26 * (4 - place):.1f}" y="16" width="26" height="11" fill="{theme.hues[0]}" '
        f'fill-opacity="{strength(share * most, most):.3f}" stroke="{theme.grid}"/>'
        for place, share in enumerate(shares)
    )
    low = text(right - 60 - 26 * 4 - 8, 26, "rank 0", theme.muted, 'text-anchor="end"')
    return boxes + low + text(right - 26, 26, fixed(most), theme.muted)


def label(part: str) -> str:
    return part if len(part) <= LONGEST else f"…{part[1 - LONGEST :]}"


def room(parts: Sequence[tuple[str, list[int]]]) -> float:
    """The pixels that the labels take on the left."""
    return LABEL + CHARACTER * max(len(label(part)) for part, _ in parts) + 8


def steps_below(end: float, left: float, right: float, bottom: float, theme: Theme) -> str:
    values = ticks(0.0, end, about=(right - left) / 90, whole=True)
    return "".join(
        text(left + value / end * (right - left), bottom + 18, said, theme.muted, 'text-anchor="middle"')
        for value, said in zip(values, labels(values), strict=True)
    )


def short(value: float) -> str:
    """A coordinate in few characters."""
    return str(int(value)) if float(value).is_integer() and value < 1e15 else f"{value:.6g}"


def picture(title: str, width: int, height: float, drawn: Sequence[str], theme: Theme) -> str:
    heading = text(16, 25, title, theme.ink, 'font-size="14" font-weight="600"')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}" '
        f'height="{height:.0f}" role="img" aria-label="{safe(title)}" font-family="{FONT}" font-size="12">\n'
        + "\n".join([ground(width, round(height), theme), heading, *drawn])
        + "\n</svg>\n"
    )
