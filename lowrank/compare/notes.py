"""What a reader must know to believe a comparison, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from lowrank.compare import shown
from lowrank.compare.ranking import Ranking


def about(ranking: Ranking) -> Iterator[str]:
    """The same in the terminal and on the page."""
    if not ranking.rows:
        yield "No run is done."
        return
    over = " and ".join(ranking.results.over)
    if ranking.seeded:
        yield f"n: runs of one configuration, over {over}. Intervals are Student's t at 95 %."
    elif len(ranking.rows) > 1 and over:
        yield f"One run of each configuration: nothing tells how much {over} alone would change."
    yield from tested(ranking)
    if ranking.left_out:
        yield f"Also different: {', '.join(ranking.left_out)} (--keys all)."
    if ranking.unmeasured:
        yield f"Without a finite {ranking.quality}: {', '.join(ranking.unmeasured)}."
    for old, new in ranking.results.repeats:
        yield f"{old.name} repeats {new.name}, which is newer and counts."


def tested(ranking: Ranking) -> Iterator[str]:
    """Against what, by which test, and how far to trust it."""
    if ranking.reference is None or len(ranking.rows) < 2:
        return
    name = ranking.reference.label(ranking.keys) or next(iter(ranking.reference.runs.values())).name
    pairs = [t.difference.n for row in ranking.rows if (t := row.tested[ranking.quality])]
    if not pairs or max(pairs) < 2:
        return
    few = f"{min(pairs)}" if min(pairs) == max(pairs) else f"{min(pairs)} to {max(pairs)}"
    tests = len([1 for row in ranking.rows if (t := row.tested[ranking.quality]) and t.p is not None])
    yield (
        f"Differences in {shown.label(ranking.quality)} are from {name}, paired over the {few} seeds that both have; "
        f"p is of the two-sided paired t-test, adjusted for {tests} comparisons (Holm)."
    )
    if max(pairs) < 5:
        yield f"With {few} seeds the test leans on normally distributed differences: take p as an order of magnitude."
    if ranking.choice.against == "best":
        yield "The best was picked by these numbers and so looks better than it is; --against names one beforehand."
