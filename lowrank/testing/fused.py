"""The fast path computes what the plain one does: with blocks that it takes, and with a method that it leaves plain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank import fast
from lowrank.adapters.inject import named_trainable
from lowrank.keys import Clock
from lowrank.models import attention
from lowrank.testing.bases import tokens
from lowrank.testing.calls import training_pass
from lowrank.testing.trial import Outcome, Trial, fails, far, logits


def same(trial: Trial) -> Outcome:
    """Logits and every gradient, of rows and of a pack, at a set time of training, in fp64; and names as before."""
    clock = Clock(5)
    model: Any = trial.trained(trial.base.exact(), clock=clock, **trial.dropout).double()
    names, before = list(model.state_dict()), logits(model.eval())
    plain = passes(model.train(), clock)
    line = fast.block.fuse(model)
    fast.swiglu.fuse(model)
    found = passes(model, clock)
    for name in plain.keys() | found.keys():
        if name not in plain or name not in found:
            return fails(f"{name} is there on one of the two paths alone")
        apart = far(found[name], plain[name], 1e-6)
        if apart and float((found[name] - plain[name]).abs().max()) > 1e-9:
            return fails(f"{name} is another on the fast path ({apart})")
    if list(model.state_dict()) != names:
        return fails("the fast path changes the names of a state")
    fast.unfuse(model)
    apart = far(logits(model.eval()), before, 0.0)
    if apart:
        return fails(f"off the fast path again the model computes something else ({apart})")
    return Outcome("holds", "" if line.partition(" (")[2] == "" else f"{line.partition(' (')[2].removesuffix(')')}")


def passes(model: Any, clock: Clock) -> dict[str, Tensor]:
    """What a training pass gives over rows, and over two documents in a pack."""
    parameters = named_trainable(model)
    found = training_pass(model, clock, parameters)
    clock.set(4, 3)
    packed = attention.logits_of(model, list(tokens(2, 7)))
    gradients = torch.autograd.grad(packed.square().mean(), list(parameters.values()), allow_unused=True)
    named = {f"the gradient of {n} in a pack": g for n, g in zip(parameters, gradients, strict=True) if g is not None}
    return {**found, "the logits of a pack": packed.detach(), **named}
