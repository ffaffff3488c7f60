"""Stopping when the held-out loss has ceased to fall: after exactly so many evaluations, resumed or not."""

from __future__ import annotations

import json
import math

import pytest
from loops import loop_of
from test_metrics import record
from transformers import LlamaForCausalLM

from lowrank.train.early import EarlyStop


class Asked:
    """What a hook asks to leave."""

    stop = False


def stopped_at(losses: list[float | None], patience: int | None, cut: int | None = None) -> int | None:
    """The step after which it stops, where ``losses[i]`` was found at step i + 1; with ``cut``, going on after that
    step from the state that a checkpoint's JSON kept."""
    loop = Asked()
    hook = EarlyStop(lambda step: losses[step - 1], patience, loop)
    for step in range(1, len(losses) + 1):
        hook.after_step(record(step))
        assert loop.stop == (hook.stopped is not None)
        if step == cut:
            kept, loop = json.loads(json.dumps(hook.state_dict())), Asked()
            hook = EarlyStop(lambda step: losses[step - 1], patience, loop)
            hook.load_state_dict(kept)
        if loop.stop:
            return hook.stopped
    return None


LOSSES = [3.0, None, 2.0, 2.5, None, 2.0, 1.9, 1.95, math.nan, None, math.inf, 1.0]


@pytest.mark.parametrize(("patience", "step"), [(1, 4), (2, 6), (3, 11), (4, None), (None, None)])
def test_it_stops_at_the_evaluation_that_makes_so_many_without_a_better_one(
    patience: int | None, step: int | None
) -> None:
    """Equal is no better; what is not finite neither; a step without an evaluation does not count."""
    assert stopped_at(LOSSES, patience) == step


@pytest.mark.parametrize("patience", [1, 2, 3, 4, None])
@pytest.mark.parametrize("cut", range(1, len(LOSSES) + 1))
def test_a_resumed_run_stops_where_it_would_have(patience: int | None, cut: int) -> None:
    assert stopped_at(LOSSES, patience, cut) == stopped_at(LOSSES, patience)


def test_more_patience_on_resume_goes_on() -> None:
    hook = EarlyStop(lambda step: 1.0, 1, Asked())
    for step in (1, 2):
        hook.after_step(record(step))
    assert hook.stopped == 2
    loop = Asked()
    patient = EarlyStop(lambda step: 1.0, 5, loop)
    patient.load_state_dict(hook.state_dict())
    assert (loop.stop, patient.stopped, patient.since) == (False, None, 1)


def test_the_loop_leaves_after_that_step(llama: LlamaForCausalLM) -> None:
    loop = loop_of(llama)
    hook = EarlyStop(lambda step: {2: 1.0, 4: 2.0, 6: 3.0, 8: 0.5}.get(step), 2, loop)
    loop.hooks = [hook]
    loop.run(10)
    assert (loop.state.step, hook.stopped, hook.best) == (6, 6, {"step": 2, "loss": 1.0})
    assert str(hook).startswith("stopped early after step 6: 2 evaluations")
    assert "1.0000 at step 2" in str(hook)
