"""``lowrank plan``: what a run would put where, what it would need, how fast it would be, and what fits a budget."""

from __future__ import annotations

from collections.abc import Iterator

from lowrank import compose
from lowrank.ledger.dry import DryRun
from lowrank.ledger.fit import Search, table
from lowrank.ledger.room import budget as size_of
from lowrank.ledger.room import gib


def plan(overrides: list[str], budget: str | None = None, *, measured: bool = True) -> Iterator[str]:
    """What to print, as it is found; ``measured``: with the expected tokens a second, for which the machine works for
    up to ten seconds, once. Raises the errors of ``lowrank.errors``."""
    limit = None if budget is None else size_of(budget)
    dry = DryRun(compose.compose(overrides))
    if limit is None:
        yield str(dry.parts.plan)
    yield str(dry.ledger)
    speed = dry.speed if measured else None
    if speed is not None:
        yield str(speed)
    if limit is not None:
        search = Search(dry.parts, dry.data, limit, dry.ledger.parts["interpreter"])
        found = search.found(None)
        least = min(search.known.values(), key=lambda setting: setting.ledger.peak)
        yield (
            table(found, limit, speed.tokens_per_s if speed else None)
            if found
            else f"nothing fits {gib(limit)}; of what was tried the least is {gib(least.ledger.peak)}: {least}"
        )
