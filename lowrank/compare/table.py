"""The comparison in the terminal: one line a group over seeds, and below it what is to be known about it."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank.compare import notes, shown
from lowrank.compare.ranking import Ranking, Row
from lowrank.report.figures import MISSING, clean

WIDTH = 100  # columns of a pipe, at least; a wider table has as many as it needs


def show(ranking: Ranking) -> None:
    """Prints it to standard output. Colours only on a terminal, and none under NO_COLOR; a pipe is never wrapped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False, markup=False, emoji=False)
    drawn = table(ranking)
    if not console.is_terminal:
        console.width = max(WIDTH, console.measure(drawn, options=console.options.update(width=10_000)).maximum)
    if ranking.rows:
        console.print(drawn)
    for sentence in notes.about(ranking):
        console.print(Text(sentence, "dim"), soft_wrap=not console.is_terminal)
    broken = ranking.results.broken
    if broken:
        console.print(Text(f"{len(broken)} of {len(ranking.results.runs)} runs are not in it:", "bold"))
    for run in broken:
        tone = {"failed": "red", "unreadable": "red", "running": "cyan"}.get(run.status, "yellow")
        console.print(Text.assemble("  ", run.name, "  ", (run.status, tone), "  ", run.cause), soft_wrap=True)


def table(ranking: Ranking) -> Table:
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    keys = shown.headings(ranking.keys)
    for key in ranking.keys:
        numeric = all(isinstance(row.group.keys.get(key), int | float) for row in ranking.rows)
        drawn.add_column(keys[key], justify="right" if numeric else "left", overflow="fold")
    if not ranking.keys:
        drawn.add_column("run", overflow="fold")
    for heading in headings(ranking):
        drawn.add_column(heading, justify="right", overflow="fold")
    for row in ranking.rows:
        named = [shown.value(row.group, key) for key in ranking.keys] or [next(iter(row.group.runs.values())).name]
        style = "bold" if row.reference else ""
        drawn.add_row(*(Text(cell, style) for cell in [*named, *cells(ranking, row)]))
    return drawn


def headings(ranking: Ranking) -> Iterator[str]:
    quality = ranking.quality
    yield "n"
    yield clean(quality)
    if ranking.seeded:
        yield "95 % interval"
    if len(ranking.rows) > 1 and ranking.reference is not None:
        yield f"− {ranking.choice.against if ranking.choice.against in ('best', 'first') else 'reference'}"
        if ranking.seeded:
            yield "95 % interval"
            yield "p (Holm)"
    yield from (clean(metric) for metric in ranking.metrics[1:])
    if ranking.costs and len(ranking.rows) > 1:
        yield "on the front of"


def cells(ranking: Ranking, row: Row) -> Iterator[str]:
    quality, form = ranking.quality, shown.formatted(ranking.quality)
    found, tested = row.estimates[quality], row.tested[quality]
    yield str(len(row.group.runs))
    yield form(found.mean if found else None)
    if ranking.seeded:
        yield shown.between(found, form)
    if len(ranking.rows) > 1 and ranking.reference is not None:
        difference = tested.difference if tested else None
        yield "" if row.reference else shown.change(difference, form)
        if ranking.seeded:
            yield "" if row.reference else shown.between(difference, form)
            yield "" if row.reference else shown.probability(tested.p if tested else None)
    for metric in ranking.metrics[1:]:
        other = row.estimates[metric]
        yield shown.formatted(metric)(other.mean if other else None)
    if ranking.costs and len(ranking.rows) > 1:
        yield ", ".join(shown.cost(cost) for cost in row.fronts) or MISSING
