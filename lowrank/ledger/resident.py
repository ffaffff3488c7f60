"""Bytes of tensors that are there throughout a run, by part: of a model with or without values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lowrank.adapters.base import Adapter
from lowrank.quant.nf4 import WEIGHT, NF4Linear


def by_part(model: nn.Module) -> dict[str, int]:
    """``weights``, ``quantisation``, ``buffers`` and ``adapters``: each tensor once, however many modules hold it."""
    sizes = dict.fromkeys(("weights", "quantisation", "buffers", "adapters"), 0)
    seen: set[int] = set()

    def add(part: str, tensors: Iterable[Tensor | None]) -> None:
        fresh = [one for one in tensors if one is not None and id(one) not in seen]
        seen.update(id(one) for one in fresh)
        sizes[part] += size_of(fresh)

    for module in model.modules():
        if isinstance(module, Adapter):
            add("adapters", [*module.parameters(), *module.buffers()])
        elif isinstance(module, NF4Linear):
            add("quantisation", [getattr(module, name) for name in WEIGHT])
    add("weights", model.parameters())
    add("buffers", model.buffers())
    return sizes


def size_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def memory_of(tensors: Iterable[Any]) -> int:
    """Bytes of the memory that tensors lie in: once, where they are views of one."""
    storages = {s.data_ptr(): s.nbytes() for t in tensors if isinstance(t, Tensor) for s in [t.untyped_storage()]}
    return sum(storages.values())
