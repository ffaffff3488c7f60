"""The page's table of groups, cell by cell; the same columns as in the terminal, and each interval drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup

from lowrank.compare import plot, shown
from lowrank.compare.ranking import Ranking, Row
from lowrank.compare.student import Estimate
from lowrank.report.figures import clean, number
from lowrank.report.svg import PAGE, safe

LONG, HIGH = 116, 16  # pixels of a drawn interval


@dataclass(frozen=True)
class Column:
    name: str
    said: str = ""  # under the pointer
    left: bool = False


@dataclass(frozen=True)
class Cell:
    text: str
    order: str = ""  # what it is sorted by; empty: last
    left: bool = False
    drawn: Markup | None = None
    best: bool = False


def columns(ranking: Ranking) -> list[Column]:
    return [*_columns(ranking)]


def _columns(ranking: Ranking) -> Iterator[Column]:
    yield Column("#")
    names = shown.headings(ranking.keys)
    for key in ranking.keys:
        yield Column(names[key], clean(key), not numeric(ranking, key))
    if not ranking.keys:
        yield Column("run", left=True)
    yield Column("n", f"runs, over {' and '.join(ranking.results.over)}")
    label, direction = shown.label(ranking.quality), shown.better(ranking.quality, ranking.higher(ranking.quality))
    yield Column(label, f"{clean(ranking.quality)}, mean; {direction}")
    if ranking.seeded:
        yield Column("95 % interval", "Student's t over seeds")
    if len(ranking.rows) > 1:
        yield Column("", "mean and interval on one scale")
    if compared(ranking):
        yield Column("difference", "from the row marked, paired over common seeds")
        if ranking.seeded:
            yield Column("p", "two-sided paired t-test, adjusted by Holm")
    for metric in ranking.metrics[1:]:
        yield Column(shown.cost(metric), f"{clean(metric)}, mean")
    if ranking.costs and len(ranking.rows) > 1:
        yield Column("front", "nothing is as good for less of these", left=True)


def numeric(ranking: Ranking, key: str) -> bool:
    return all(number(row.group.keys.get(key)) is not None for row in ranking.rows)


def compared(ranking: Ranking) -> bool:
    return len(ranking.rows) > 1 and ranking.reference is not None


def rows(ranking: Ranking) -> list[tuple[bool, list[Cell]]]:
    """Whether it is what the others are compared with, and its cells."""
    return [
        (row.reference and compared(ranking), [*_row(ranking, row, n)]) for n, row in enumerate(ranking.rows, start=1)
    ]


def _row(ranking: Ranking, row: Row, place: int) -> Iterator[Cell]:
    yield Cell(str(place), str(place))
    for key in ranking.keys:
        value = number(row.group.keys.get(key))
        order = str(value) if value is not None else clean(row.group.text(key))
        yield Cell(shown.value(row.group, key), order, not numeric(ranking, key))
    if not ranking.keys:
        name = next(iter(row.group.runs.values())).name
        yield Cell(name, name, left=True)
    yield Cell(str(len(row.group.runs)), str(len(row.group.runs)))
    metric, form = ranking.quality, shown.formatted(ranking.quality)
    found = row.estimates[metric]
    yield Cell(form(found.mean if found else None), ordering(found), best=True)
    if ranking.seeded:
        wide = found.high - found.low if found and found.high is not None and found.low is not None else None
        yield Cell(shown.between(found, form), "" if wide is None else str(wide))
    if len(ranking.rows) > 1:
        yield Cell("", ordering(found), drawn=bar(ranking, found))
    if compared(ranking):
        yield from difference(ranking, row)
    for other in ranking.metrics[1:]:
        estimate = row.estimates[other]
        yield Cell(shown.formatted(other)(estimate.mean if estimate else None), ordering(estimate))
    if ranking.costs and len(ranking.rows) > 1:
        yield Cell(", ".join(shown.cost(cost) for cost in row.fronts), str(-len(row.fronts)), left=True)


def difference(ranking: Ranking, row: Row) -> Iterator[Cell]:
    tested, form = row.tested[ranking.quality], shown.formatted(ranking.quality)
    found = tested.difference if tested else None
    yield Cell("reference" if row.reference else shown.change(found, form), str(found.mean) if found else "0")
    if ranking.seeded:
        p = tested.p if tested else None
        yield Cell("" if row.reference else shown.probability(p), "" if p is None else str(p))


def ordering(found: Estimate | None) -> str:
    return "" if found is None else repr(found.mean)


def bar(ranking: Ranking, found: Estimate | None) -> Markup:
    """The mean as a dot and its interval as a line, on the scale of the whole column."""
    known = [one for row in ranking.rows if (one := row.estimates[ranking.quality])]
    if found is None or not known:
        return Markup("")
    higher = ranking.higher(ranking.quality)
    kept, _ = plot.telling([one.mean for one in known], higher)
    low, high = min(kept), max(kept)
    room = 0.08 * (high - low) or 1.0

    def at(value: float) -> float:
        share = (value - low + room) / (high - low + 2 * room)
        return 4 + min(max(share, 0.0), 1.0) * (LONG - 8)

    line = ""
    if found.low is not None and found.high is not None:
        ends = f"M{at(found.low):.1f} 8H{at(found.high):.1f}"
        line = f'<path d="{ends}" stroke="{plot.HUES[0]}" stroke-width="2" stroke-opacity=".5"/>'
    colour = plot.HUES[0] if low - room <= found.mean <= high + room else PAGE.alarm
    said = safe(f"{shown.formatted(ranking.quality)(found.mean)}")
    return Markup(
        f'<svg width="{LONG}" height="{HIGH}" viewBox="0 0 {LONG} {HIGH}" role="img" aria-label="{said}">'
        f'<path d="M4 8H{LONG - 4}" stroke="{plot.GRID}"/>'
        f'{line}<circle cx="{at(found.mean):.1f}" cy="8" r="4" fill="{colour}"/></svg>'
    )
