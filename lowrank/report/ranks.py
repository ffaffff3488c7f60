"""How the ranks of a run's sites moved: a heat map of site by step, and the final rank of every layer's every part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lowrank.report import layers
from lowrank.report.curves import labels, ticks
from lowrank.report.figures import fixed, mapping, number
from lowrank.report.layers import label, picture, pointer, room, strength
from lowrank.report.svg import PAGE, Theme, text

TALLEST = 1200  # pixels, of all rows together
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
    left = room([part for part, _ in parts])
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
    last = [row[-1] or 0.0 for row in ranks.table]
    cells = [
        layers.Cell(one.part, one.layer, rank, fixed(rank), course(ranks, place))
        for place, (one, rank) in enumerate(zip(ranks.sites, last, strict=True))
    ]
    return layers.draw("Final rank of each site, by layer", cells, width, theme)


def course(ranks: Ranks, place: int) -> str:
    """``model.layers.0.mlp.up_proj``, and below it ``24 → 24 → 17`` without what did not change."""
    known = [rank for rank, _ in groupby(rank for rank in ranks.table[place] if rank is not None)]
    shown = known if len(known) < 8 else [*known[:3], *known[-4:]]
    return f"{ranks.sites[place].path}\nrank {' → '.join(fixed(rank) for rank in shown)}"


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


def steps_below(end: float, left: float, right: float, bottom: float, theme: Theme) -> str:
    values = ticks(0.0, end, about=(right - left) / 90, whole=True)
    return "".join(
        text(left + value / end * (right - left), bottom + 18, said, theme.muted, 'text-anchor="middle"')
        for value, said in zip(values, labels(values), strict=True)
    )


def short(value: float) -> str:
    """A coordinate in few characters."""
    return str(int(value)) if float(value).is_integer() and value < 1e15 else f"{value:.6g}"
