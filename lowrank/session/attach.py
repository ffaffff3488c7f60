"""A base made ready to train: its adapters put on and checked, and the optimizer over what trains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowrank import classes
from lowrank.adapters import preflight
from lowrank.adapters.inject import apply, named_trainable
from lowrank.assemble import Data, Loaded, Parts, quickened
from lowrank.evaluate import Evaluator
from lowrank.keys import Clock
from lowrank.schema import Config, Optim
from lowrank.train import flat, optim
from lowrank.train.flat import Flat
from lowrank.train.in_backward import InBackward
from lowrank.train.loss import target_logits, target_loss
from lowrank.train.precision import Precision
from lowrank.train.update import EachParameter, Update


def attach(
    parts: Parts,
    data: Data,
    loaded: Loaded,
    evaluator: Evaluator,
    precision: Precision,
    clock: Clock,
    state: dict[str, Tensor] | None,
) -> str:
    """Puts the adapters on the loaded model, with a checkpoint's ``state`` where there is one, checks on two documents
    that they are what the plan and their class promise, and takes the fast path: returns the line that tells of it."""
    model = loaded.model
    probe = loaded.collate(data.train[:2]).to(parts.device)
    model.eval()
    with torch.no_grad(), precision.autocast():
        bare = target_logits(model, probe)
    apply(model, parts.plan, parts.config.loop.seed, clock, state=state, keep_base=False)
    model.eval()
    if state is None:
        with torch.no_grad(), precision.autocast():
            preflight.check_identity(model, bare, target_logits(model, probe))
    evaluator.check_room(model)  # an adapter may have taken positions
    preflight.check_subclasses(model)
    with precision.autocast():
        loss = target_loss(model, probe)
    loss.backward()
    preflight.check_gradients(model)
    model.zero_grad(set_to_none=True)
    return quickened(parts, model)


def optimizer(settings: Optim, model: nn.Module, *, fast: bool = False) -> torch.optim.Optimizer:
    """Over what trains, by ``optim.groups``; ``fast``: with torch's fused kernel, where it has one."""
    cls = classes.resolve(settings.target, torch.optim.Optimizer, "optim._target_")
    trained = named_trainable(model)
    made = optim.groups(trained, settings.groups, lr=settings.lr, weight_decay=settings.weight_decay)
    kernel = optim.fused(cls, settings.options, trained.values()) if fast else {}
    return cls(made, **kernel, **settings.options)


def updating(config: Config, made: torch.optim.Optimizer, say: Callable[[str], None]) -> Update:
    """How gradients become an update; ``say`` is told where it comes to differ from what that says of itself."""
    if config.optim.in_backward:
        return InBackward(made)
    why = flat.why_not(made) if config.loop.fast else "loop.fast=false"
    return Flat(made, say) if why is None else EachParameter(made, why)
