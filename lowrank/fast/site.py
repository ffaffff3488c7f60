"""Linear sites that read one input, as a block's fused forward sees them: frozen layers and, where they have one,
their LoRA.

y = x Wᵀ + b + s·B A drop(x). ``forward`` and ``backward`` are the two directions of that line, rank first: of LoRA's
own nothing wider than (tokens, r) is made, and its two products are added in place (updates.py). drop(x) is x itself
with p of its entries at zero while it is read: 1/(1 − p) goes into s. A mask is drawn once for all sites that share it.

Where several runs train in one pass (adapters/together.py) a site has an update for each run's own rows of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters.bank import Bank
from lowrank.adapters.base import LINEAR, Adapted, Adapter, dense_weight
from lowrank.adapters.methods.adalora import AdaLoRA
from lowrank.adapters.methods.dropout import mask_of
from lowrank.adapters.methods.lora import LoRA
from lowrank.adapters.together import Bundle
from lowrank.fast import linear
from lowrank.fast.cast import cast
from lowrank.fast.updates import Update, groups
from lowrank.quant.nf4 import NF4Linear


@dataclass(frozen=True)
class Site:
    """A layer, and what is added to its output; nothing where it stands bare."""

    layer: Any  # Linear, Conv1D or NF4Linear, frozen
    updates: tuple[Update, ...] = ()


def site(module: nn.Module, dtype: torch.dtype) -> Site:
    """The parts of a module that ``why_not`` has nothing against, for products in ``dtype``."""
    if not isinstance(module, Adapted):
        return Site(module)
    if module.bypassed and module.original is not None:
        return Site(module.original)
    if isinstance(module.adapter, Bundle):
        return Site(module.base, tuple(update(one, dtype, rows) for one, rows in module.adapter.at_work()))
    adapter: Any = in_use(module)
    return Site(module.base, () if adapter is None else (update(adapter, dtype),))


def update(adapter: Any, dtype: torch.dtype, rows: slice | None = None) -> Update:
    """AdaLoRA's is a LoRA of diag(E) A and B, to which autograd hands on the gradient of the first."""
    if type(adapter) is LoRA:
        return Update(adapter.A, adapter.B, *cast(adapter, dtype), adapter.scale, *mask_of(adapter), rows)
    EA = adapter.E[:, None] * adapter.A  # (r, in)
    a, b = EA.detach().to(dtype), adapter.B.detach().to(dtype)
    return Update(EA, adapter.B, a, b, adapter.scale, *mask_of(adapter), rows)


def in_use(module: Adapted) -> Adapter | None:
    """The adapter that a call goes through: of a bank the chosen one, or None where it has none here."""
    adapter = module.adapter
    return adapter.chosen() if isinstance(adapter, Bank) else adapter


def why_not(module: nn.Module) -> str | None:
    """What keeps a module from being a fused site, or None."""
    if not isinstance(module, Adapted):
        return layer_why_not(module)
    if isinstance(module.adapter, Bank) and isinstance(module.adapter.route.chosen, tuple):
        return "the rows of a batch go through adapters of their own"
    several = module.adapter.members.values() if isinstance(module.adapter, Bundle) else [in_use(module)]
    for adapter in several:
        if adapter is not None and type(adapter) not in (LoRA, AdaLoRA):
            return f"{type(adapter).__name__} is not plain LoRA"
    return layer_why_not(module.original if module.bypassed and module.original is not None else module.base)


def layer_why_not(layer: nn.Module) -> str | None:
    if type(layer) not in LINEAR:
        return f"{type(layer).__name__} is not a linear layer"
    if any(p.requires_grad for p in layer.parameters(recurse=False)):
        return "its weights train"
    if getattr(layer, "compute_dtype", None) is not None:
        return "it has a compute_dtype of its own"
    if getattr(vars(layer).get("forward"), "__func__", linear.forward) is not linear.forward:
        return "its forward has been replaced"
    return None


def tensors(sites: Sequence[Site]) -> list[Tensor]:
    """A and B of every update, site by site: the inputs of an autograd Function that a gradient goes to."""
    return [tensor for s in sites for u in s.updates for tensor in (u.A, u.B)]


def forward(h: Tensor, sites: Sequence[Site], added: Tensor | None = None) -> tuple[Tensor, ...]:
    """h Wᵀ + b + s·B A drop(h), plus ``added``, of each site: h (tokens, in) → (tokens, out), always new tensors."""
    within = added if added is not None and added.dtype == h.dtype else None
    ys = [linear.product(h, dense(s.layer, h.dtype), s.layer.bias, within) for s in sites]  # (tokens, out) each
    for group in groups(h, [s.updates for s in sites]):
        group.add(h, ys)
    return tuple(ys if added is None or within is not None else [added + y for y in ys])  # in the wider of the two


def backward(
    grads: Sequence[Tensor], h: Tensor, sites: Sequence[Site], wanted: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradient of h where it is ``wanted``, and those of every A and B in the order of ``tensors``; from ``grads``
    (tokens, out) and h (tokens, in)."""
    grad_h = None
    for grad, s in zip(grads, sites, strict=True):
        if wanted:
            grad_h = linear.product(grad, dense(s.layer, grad.dtype).T, None, grad_h)  # (tokens, in)
    found: list[Tensor | None] = [None] * len(tensors(sites))
    for group in groups(h, [s.updates for s in sites]):
        group.back(grads, h, grad_h, found)
    return grad_h, found


def dense(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """A layer's weight (out, in): dequantised into ``dtype`` at once, to be used by one product and let go."""
    return layer.dequantize(dtype) if isinstance(layer, NF4Linear) else dense_weight(layer)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products run in: autocast's dtype inside of it, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
