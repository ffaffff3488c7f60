"""Documents into packs of a token budget, with little of it left over: best-fit decreasing.

The longest document first, each into the fullest pack that has room for it: no more than 11/9 of the fewest packs
possible and one (Johnson, Near-optimal bin packing algorithms, 1973). It is done within stretches of the given order,
so that which documents come together is drawn anew in every epoch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

STRETCH = 64  # budgets of documents that are packed together: nearly always some of them fill what another leaves


def best_fit(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Packs of at most ``budget`` tokens that hold each of ``order`` once; ``lengths`` are by index.

    A document longer than the budget is a pack of its own.
    """
    made: list[list[int]] = []
    over: list[int] = []  # a stretch's emptiest pack: its documents wait for the next one
    for some in stretches(order, lengths, STRETCH * budget):
        *full, over = packs([*over, *some], lengths, budget)
        made += full
    return [*made, over] if over else made


def stretches(order: Sequence[int], lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """``order`` cut where so many tokens are together."""
    some: list[int] = []
    room = tokens
    for index in order:
        some.append(index)
        room -= lengths[index]
        if room <= 0:
            yield some
            some, room = [], tokens
    if some:
        yield some


def packs(some: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """The fullest first."""
    made: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), ascending
    for index in sorted(some, key=lambda index: -lengths[index]):
        place = bisect_left(room, (lengths[index], 0))
        if place == len(room):
            left, pack = budget, len(made)
            made.append([])
        else:
            left, pack = room.pop(place)
        made[pack].append(index)
        insort(room, (left - lengths[index], pack))
    return [made[pack] for _, pack in room]
