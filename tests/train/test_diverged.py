"""A run ends where the running average of its loss has run away from its lowest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from test_metrics import record

from lowrank.train.diverged import Diverged
from lowrank.train.finite import Fault


class Asked:
    stop = False


def stopped_at(losses: Sequence[float], factor: float | None, cut: int | None = None) -> int | None:
    loop = Asked()
    hook = Diverged(factor, loop)
    for step, loss in enumerate(losses, 1):
        hook.after_step(replace(record(step), loss=loss))
        assert loop.stop == (hook.stopped is not None)
        if step == cut:
            kept, loop = json.loads(json.dumps(hook.state_dict())), Asked()
            hook = Diverged(factor, loop)
            hook.load_state_dict(kept)
        if loop.stop:
            return hook.stopped
    return None


def test_a_loss_that_stays_at_so_many_times_its_lowest_ends_the_run() -> None:
    losses = [4.0] * 10 + [9.0] * 20
    assert 10 < (stopped_at(losses, 2.0) or 0) <= 20
    assert stopped_at(losses, 2.5) is None
    assert stopped_at(losses, None) is None


def test_one_step_that_stands_out_does_not() -> None:
    assert stopped_at([4.0] * 10 + [12.0] + [4.0] * 10, 2.0) is None


def test_the_first_steps_do_not_count_more_than_others() -> None:
    assert stopped_at([2.0] * 30, 1.001) is None


@pytest.mark.parametrize("cut", [1, 9, 11])
def test_a_resumed_run_stops_where_it_would_have(cut: int) -> None:
    losses = [4.0] * 10 + [9.0] * 20
    assert stopped_at(losses, 2.0, cut) == stopped_at(losses, 2.0)


def test_a_batch_that_was_not_finite_ends_it_too() -> None:
    loop = Asked()
    hook = Diverged(2.0, loop)
    hook.after_skip(Fault(7, "loss is nan", (1, 2)))
    assert (hook.stopped, loop.stop) == (6, True)
    indifferent = Diverged(None, Asked())
    indifferent.after_skip(Fault(7, "loss is nan", (1, 2)))
    assert indifferent.stopped is None
