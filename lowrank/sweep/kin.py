"""Which jobs have a base in common, and which of them may train in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from lowrank.sweep import compatible
from lowrank.sweep.job import Job


class Kin:
    """Keys are asked for where a worker needs them."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.base, self.pass_of = cache(self.base_key), cache(self.together_key)

    def near(self, places: Sequence[int], held: str | None) -> list[int]:
        """In order, but those first whose base a worker holds."""
        return list(places) if held is None else sorted(places, key=lambda place: self.base(place) != held)

    def together(self, first: int, places: Sequence[int]) -> list[int]:
        """Of ``places`` those that may train in one pass with ``first``."""
        if self.pass_of(first) is None:
            return []
        alike = (self.base(first), self.pass_of(first))
        return [place for place in places if place != first and (self.base(place), self.pass_of(place)) == alike]

    def base_key(self, place: int) -> str:
        return compatible.base_key(self.jobs[place].config)

    def together_key(self, place: int) -> str | None:
        return compatible.together_key(self.jobs[place].config)

    def why_alone(self, place: int) -> str | None:
        """What keeps a job from training in one pass with any."""
        return compatible.why_alone(self.jobs[place].config)
