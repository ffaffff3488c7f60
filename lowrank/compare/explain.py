"""Which keys move a figure: the values that each takes, and the share of the figure's variance that they explain."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from lowrank.compare import shown
from lowrank.compare.groups import Group
from lowrank.compare.keys import natural, written
from lowrank.report.figures import MISSING, number

MOST = 10  # values of a number that stand for themselves; more are put into classes
CLASSES = 6


@dataclass(frozen=True)
class Level:
    """One value of a key, or a class of neighbouring ones, and the groups that have it."""

    name: str
    places: tuple[int, ...]


@dataclass(frozen=True)
class Effect:
    """What a key does to a figure."""

    key: str
    levels: list[Level]
    numeric: bool  # its levels have an order of size
    share: float | None  # of the variance of the runs' ranks that it alone explains; None: cannot be told
    numbers: list[float | None] | None = None  # each group's value, where the levels are classes of many


def effect(groups: Sequence[Group], key: str, metric: str) -> Effect:
    levels, numeric = levels_of(groups, key)
    values = [[v for place in level.places for v in groups[place].values(metric).values()] for level in levels]
    numbers = [number(group.keys.get(key)) for group in groups]
    classed = numeric and len(set(numbers)) > len(levels)
    return Effect(key, levels, numeric, explained([found for found in values if found]), numbers if classed else None)


def effects(groups: Sequence[Group], keys: Sequence[str], metric: str) -> list[Effect]:
    """Of each key with at least two levels, what explains most first."""
    found = [effect(groups, key, metric) for key in keys]
    return sorted((one for one in found if len(one.levels) > 1), key=lambda one: -(one.share or 0.0))


def together(groups: Sequence[Group], one: Effect, other: Effect, metric: str) -> float:
    """The share of the variance of ranks that the pairs of their values explain; where each pair has one run, the sum
    of what each explains alone."""
    pairs = [set(a.places) & set(b.places) for a in one.levels for b in other.levels]
    values = [[value for place in pair for value in groups[place].values(metric).values()] for pair in pairs]
    found = explained([known for known in values if known])
    return found if found is not None else (one.share or 0.0) + (other.share or 0.0)


def explained(levels: Sequence[Sequence[float]]) -> float | None:
    """1 − (variance within levels) / (variance of all) of the values' ranks, never below 0: ε² of Kruskal and Wallis.

    Ranks, so that a run that diverged counts as one bad run, and loss and perplexity tell the same. None where every
    level has one value, and where nothing varies.
    """
    values = [value for level in levels for value in level]
    rank = ranks(values)
    total = squares([rank[value] for value in values]) if values else 0.0
    if len(values) <= len(levels) or len(levels) < 2 or total == 0:
        return None
    within = math.fsum(squares([rank[value] for value in level]) for level in levels) / (len(values) - len(levels))
    return max(0.0, 1 - within / (total / (len(values) - 1)))


def ranks(values: Sequence[float]) -> dict[float, float]:
    """Each value's place in their order, from 1; equal values have the mean of theirs."""
    order = sorted(values)
    return {value: (bisect_left(order, value) + bisect_right(order, value) + 1) / 2 for value in order}


def squares(values: Sequence[float]) -> float:
    """The sum of squared distances from the mean."""
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values)


def levels_of(groups: Sequence[Group], key: str) -> tuple[list[Level], bool]:
    """The levels in order, groups without the key last; and whether all are numbers."""
    texts = [group.text(key) if key in group.keys else None for group in groups]
    numbers = [number(group.keys.get(key)) for group in groups]
    with_key = [place for place, text in enumerate(texts) if text is not None]
    numeric = all(numbers[place] is not None for place in with_key)
    distinct = {texts[place]: numbers[place] for place in with_key}
    if numeric and len(distinct) > MOST:
        levels = classes(with_key, numbers)
    else:
        names = sorted(distinct, key=lambda text: (distinct[text] or 0.0, natural(str(text))))
        levels = [Level(shown.value(groups[first(texts, text)], key), places(texts, text)) for text in names]
    missing = places(texts, None)
    return levels + ([Level(MISSING, missing)] if missing else []), numeric and not missing


def first(texts: Sequence[str | None], text: str | None) -> int:
    return texts.index(text)


def places(texts: Sequence[str | None], text: str | None) -> tuple[int, ...]:
    return tuple(place for place, found in enumerate(texts) if found == text)


def classes(with_key: Sequence[int], values: Sequence[float | None]) -> list[Level]:
    """Neighbouring values together, about as many groups in each class; equal values are never parted."""
    order = sorted(with_key, key=lambda place: values[place] or 0.0)
    cuts: list[list[int]] = [[]]
    for index, place in enumerate(order):
        full = index * CLASSES // len(order) >= len(cuts)
        if full and cuts[-1] and values[cuts[-1][-1]] != values[place]:
            cuts.append([])
        cuts[-1].append(place)
    return [Level(between(values[cut[0]], values[cut[-1]]), tuple(cut)) for cut in cuts]


def between(low: float | None, high: float | None) -> str:
    if low == high:
        return written(low)
    return f"{shown.short(rounded(low))} – {shown.short(rounded(high))}"


def rounded(value: float | None) -> float:
    """To two digits that matter: where a class ends need not be told more exactly."""
    return float(f"{value or 0.0:.2g}")
