"""What is tortured: lowrank's run or the Trainer's, in the words that both have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

STEPS, EVERY = 8, 2  # of a run, and between its checkpoints


@dataclass(frozen=True)
class Place:
    """A part of a run: what happens in the ``nth`` call of a function."""

    name: str
    owner: Any
    function: str
    nth: int
    overrides: tuple[str, ...] = ()
    most: int | None = None  # points that are taken of it where nobody says how many; None: all


class Arm(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def places(self) -> tuple[Place, ...]: ...
    def having(self, *more: str) -> Arm: ...
    def keeping(self) -> Arm: ...
    def program(self, folder: Path) -> None:
        """The whole program, in a process of its own."""

    def again(self, folder: Path) -> None:
        """What a user starts to go on with it."""

    def ended(self, folder: Path) -> dict[str, str]:
        """Hashes of what must be equal in the end, by name."""

    def newest(self, folder: Path) -> str: ...
    def wrong(self, folder: Path, output: str, newest: str) -> str: ...


@dataclass(frozen=True)
class Figure:
    """How many points there were, and what became of those that did not pass."""

    total: int
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> int:
        return self.total - len(self.failures)

    def __str__(self) -> str:
        return f"{self.passed:,} of {self.total:,}"


@dataclass(frozen=True)
class Row:
    """A line of the table; None where a torture does not apply."""

    torture: str
    ours: Figure | None
    peer: Figure | None = None


def spaced(points: list[Any], most: int | None) -> list[Any]:
    """At most so many, evenly spaced over all; None: all."""
    if most is None or most >= len(points):
        return points
    return [points[n * len(points) // most] for n in range(most)]


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]
