"""Which groups nothing beats: the Pareto front of quality against a cost."""

from __future__ import annotations

from collections.abc import Sequence


def front(quality: Sequence[float | None], cost: Sequence[float | None], *, higher: bool) -> list[bool]:
    """Whether no other point is at least as good and as cheap, and one of the two more so. Costs are better low;
    quality is where ``higher`` is false. A point without either is on no front."""
    sign = -1.0 if higher else 1.0
    pairs = zip(quality, cost, strict=True)
    points = [(sign * q, c) if q is not None and c is not None else None for q, c in pairs]
    known = [point for point in points if point is not None]
    return [point is not None and not any(beats(other, point) for other in known) for point in points]


def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]
