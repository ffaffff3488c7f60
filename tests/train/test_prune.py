"""Pruning: a job stops where its best so far lies above the median of the others' best, and nowhere else."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
from test_metrics import record

from lowrank.train.prune import Prune


class Asked:
    """What a hook asks to leave."""

    stop = False


def judged(
    losses: Sequence[float | None],
    others: Sequence[Sequence[float]],
    fewest: int | None = 2,
    *,
    cut: int | None = None,
) -> Prune:
    """The hook after the step at which it stops, or the last one. ``others[i]`` are the other jobs' at step i + 1;
    with ``cut``, going on after that step from the state that a checkpoint's JSON kept."""
    loop = Asked()

    def fresh() -> Prune:
        return Prune(lambda step: losses[step - 1], lambda step: others[step - 1], fewest, loop)

    hook = fresh()
    for step in range(1, len(losses) + 1):
        hook.after_step(record(step))
        assert loop.stop == (hook.stopped is not None)
        if step == cut:
            kept, loop = json.loads(json.dumps(hook.state_dict())), Asked()
            hook = fresh()
            hook.load_state_dict(kept)
        if loop.stop:
            break
    return hook


THREE = [[2.0, 3.0, 5.0]] * 4


def test_the_worse_half_is_pruned_and_the_median_itself_is_not() -> None:
    assert judged([3.0], THREE).stopped is None
    found = judged([3.001], THREE)
    assert found.found == {"step": 1, "best": 3.001, "median": 3.0, "jobs": 3}
    assert "above 3.0000, the median of 3 other jobs" in str(found)


def test_the_best_so_far_counts_not_the_last() -> None:
    assert judged([2.5, 9.0, math.inf], THREE).stopped is None


def test_a_loss_that_was_never_finite_is_pruned() -> None:
    found = judged([math.nan], THREE)
    assert (found.stopped, found.found and found.found["best"]) == (1, None)
    assert "never finite" in str(found)


def test_too_few_others_prune_nobody() -> None:
    assert judged([9.0, 9.0], [[1.0], [1.0, 1.0]]).stopped == 2
    assert judged([9.0], [[]], fewest=1).stopped is None


def test_without_the_key_nothing_is_pruned() -> None:
    assert judged([9.0] * 4, THREE, fewest=None).stopped is None


def test_a_step_without_an_evaluation_is_no_judgement() -> None:
    assert judged([None, None, 9.0], THREE).stopped == 3


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_resumed_run_stops_where_it_would_have(cut: int) -> None:
    losses, others = [4.0, None, 3.5, 3.4], [[5.0, 5.0], [], [4.0, 4.0], [3.0, 3.1]]
    assert judged(losses, others).found == judged(losses, others, cut=cut).found
    assert judged(losses, others, cut=cut).stopped == 4


def test_a_pruned_run_goes_on_when_the_key_is_taken_away() -> None:
    state, loop = judged([9.0], THREE).state_dict(), Asked()
    again = Prune(lambda step: 9.0, lambda step: [1.0], 1, loop)
    again.load_state_dict(state)
    assert loop.stop
    freed = Prune(lambda step: 9.0, lambda step: [1.0], None, Asked())
    freed.load_state_dict(state)
    assert freed.stopped is None
    assert not freed.loop.stop
