"""One hash over all that was trained on, in its order."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

from lowrank.train.loop import State


@dataclass(frozen=True)
class Rows:
    rows: tuple[int, ...]


def order_of(*steps: list[list[int]]) -> str:
    """Of steps of micro-batches of rows."""
    state = State()
    for step in steps:
        batches: Any = [Rows(tuple(rows)) for rows in step]
        state.consume(batches)
    assert state.position == len(steps)
    return state.data_order


def test_the_hash_is_of_rows_micro_batches_and_steps_in_their_order() -> None:
    courses = [
        [[[1, 2], [3]], [[4]]],
        [[[2, 1], [3]], [[4]]],
        [[[3], [1, 2]], [[4]]],
        [[[4]], [[1, 2], [3]]],
        [[[1], [2, 3]], [[4]]],
        [[[1, 2], [3], [4]]],
        [[[12], [3]], [[4]]],
        [[[1, 2], [3]]],
        [[[1, 2], [3]], [[4]], [[4]]],
    ]
    for one, other in combinations(courses, 2):
        assert order_of(*one) != order_of(*other), (one, other)
    assert order_of(*courses[0]) == order_of(*courses[0])
