"""A base made ready to train: its adapters put on and checked."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.adapters import preflight
from lowrank.adapters.inject import apply
from lowrank.assemble import Data, Loaded, Parts, quickened
from lowrank.evaluate import Evaluator
from lowrank.keys import Clock
from lowrank.train.loss import target_logits, target_loss
from lowrank.train.precision import Precision


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
