"""What a step keeps for backward, counted on the model that trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowrank import assemble
from lowrank.adapters.inject import apply
from lowrank.assemble import Parts
from lowrank.keys import Clock


def real(parts: Parts) -> Any:
    """The model of a run, with values, as it trains."""
    model = assemble.load(parts).model
    apply(model, parts.plan, parts.config.loop.seed, Clock(0), keep_base=False)
    assemble.quickened(parts, model)
    return model.train()


class Saved:
    """Bytes of the storages that autograd keeps, those of the model and of the batch left out."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        known = (*model.parameters(), *model.buffers(), *inputs.values())
        self.known = {one.untyped_storage().data_ptr() for one in known}
        self.sizes: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


def saved_by_a_step(parts: Parts, batch: Any) -> int:
    model = real(parts)
    saved = Saved(model, batch.inputs)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        loss = assemble.loss(parts.config)(model, batch)
    assert loss.requires_grad
    return saved.bytes
