"""A training pass over a tiny model, plain and fused: what the tests of the fast path compare."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters import LoRA
from lowrank.adapters.inject import apply, named_trainable
from lowrank.adapters.plan import plan
from lowrank.data.pack import Batch
from lowrank.fast import block
from lowrank.keys import Clock, key
from lowrank.models import attention
from lowrank.train.loss import target_loss

LENGTHS = (7, 12, 3, 9)
BLOCKS = 2  # of the tiny models


def adapted(model: Any, p: float = 0.0, targets: Any = "all-linear", **options: Any) -> Any:
    """The model with packed attention and LoRA away from its start, in training mode at a fixed time."""
    model.requires_grad_(False)
    assert attention.install(model) is None
    clock = Clock(0)
    apply(model, plan(model, {targets: partial(LoRA, r=4, dropout=p, **options)}), clock=clock)
    for path, parameter in named_trainable(model).items():
        parameter.data.normal_(0, 0.1, generator=key(1, path))
    clock.set(3, 0)
    return model.train()


def still(model: Any) -> Any:
    """Without the model's own dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def trained(model: Any, batch: Batch, context: Any = None) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, and bytes kept between forward and backward that are no parameter's."""
    kept: dict[int, Tensor] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), context or nullcontext():
        loss = target_loss(model, batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in named_trainable(model).items() if p.grad is not None}
    return loss.detach(), gradients, sum(t.untyped_storage().nbytes() for t in kept.values())


def agree(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).abs().max()) <= tolerance * float(gradient.abs().max()), name


def nodes(loss: Tensor) -> Counter[str]:
    """How often each of autograd's nodes is met behind a loss."""
    seen, open_, found = set(), [loss.grad_fn], Counter[str]()
    while open_:
        node = open_.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found[type(node).__name__] += 1
            open_ += [next_ for next_, _ in node.next_functions]
    return found


def blocks_run(model: Any, batch: Batch) -> int:
    """How many blocks really run fused in a training pass."""
    found = nodes(target_loss(model, batch))
    return found["NormGatedBackward"] + found["NormGeluBackward"]


def check_fused_equals_plain(
    model: Any, batch: Batch, tolerance: float, fused: int = BLOCKS, context: Any = None
) -> None:
    """Loss and every gradient of a model that is not fused, then with ``fused`` of its blocks so; left fused."""
    assert blocks_run(model, batch) == 0
    loss, wanted, _ = trained(model, batch, context)
    block.fuse(model)
    assert blocks_run(model, batch) == fused
    found, gradients, _ = trained(model, batch, context)
    assert abs(float(found) - float(loss)) <= tolerance * abs(float(loss))
    agree(gradients, wanted, tolerance)
