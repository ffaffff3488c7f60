"""The top of the page: what was varied, how it ended, and the few figures to remember."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from lowrank.compare import shown
from lowrank.compare.explain import Effect
from lowrank.compare.groups import Results
from lowrank.compare.ranking import Ranking, Row
from lowrank.report import figures
from lowrank.report.cards import Card

ENOUGH = 3  # seeds from which on not being told apart says something
TONES = {
    "done": "done",
    "failed": "failed",
    "unreadable": "failed",
    "interrupted": "interrupted",
    "cut off": "interrupted",
}


def title(ranking: Ranking) -> str:
    """``r × alpha × lr``, or what the only configuration is called."""
    names = list(shown.headings(ranking.keys).values())
    if not names:
        return "One configuration" if len(ranking.rows) == 1 else "Runs"
    return " × ".join(names[:5]) + (" × …" if len(names) > 5 else "")


def states(results: Results) -> list[tuple[str, str]]:
    """``("54 done", "done")``: what became of the runs, and the class of its colour."""
    found = Counter(run.status for run in results.runs)
    order = sorted(found, key=lambda status: (status != "done", status))
    return [(f"{found[status]} {status}", TONES.get(status, "unfinished")) for status in order]


def cards(ranking: Ranking, effects: Sequence[Effect]) -> list[Card]:
    return [*made(ranking, effects)] if ranking.rows else []


def made(ranking: Ranking, effects: Sequence[Effect]) -> Iterator[Card]:
    metric = ranking.quality
    form = shown.formatted(metric)
    known = [(found, row) for row in ranking.rows if (found := row.estimates[metric])]
    if known:
        sign = -1 if ranking.higher(metric) else 1
        known.sort(key=lambda pair: sign * pair[0].mean)
        found, row = known[0]
        interval = f", 95 % interval {shown.between(found, form)}" if found.low is not None else ""
        yield Card(f"Best {shown.label(metric)}", form(found.mean), f"{shown.name(ranking.keys, row.group)}{interval}")
        if len(known) > 1:
            yield Card("Worst", form(known[-1][0].mean), shown.name(ranking.keys, known[-1][1].group))
        if small := as_good(ranking, row):
            value = shown.count(parameters(small))
            yield Card(
                "Smallest not told apart from the best",
                value,
                f"trainable parameters: {shown.name(ranking.keys, small.group)}",
            )
    if effects and (share := effects[0].share) is not None:
        key = shown.headings(ranking.keys)[effects[0].key]
        yield Card("Explains most", f"{share * 100:.0f} %", f"of the variance of ranks: {key}")
    runs = [run for row in ranking.rows for run in row.group.runs.values()]
    seconds = [time for run in runs if (time := run.metric("seconds")) is not None]
    configurations = f"{len(ranking.rows)} configuration{'s' if len(ranking.rows) > 1 else ''}"
    yield Card("Training time, all runs", figures.duration(math.fsum(seconds)), f"{len(runs)} runs of {configurations}")


def parameters(row: Row) -> float:
    found = row.group.estimate("trainable_parameters")
    return found.mean if found else math.inf


def as_good(ranking: Ranking, best: Row) -> Row | None:
    """The group with the fewest trainable parameters whose paired difference from the best has 0 in its interval."""
    fitting = []
    for row in ranking.rows:
        found = row.group.difference(best.group, ranking.quality) if row is not best else None
        if (
            found
            and found.n >= ENOUGH
            and found.low is not None
            and found.high is not None
            and found.low <= 0 <= found.high
        ):
            fitting.append(row)
    smaller = [row for row in fitting if parameters(row) < parameters(best)]
    return min(smaller, key=parameters) if smaller else None
