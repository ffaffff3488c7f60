"""A linear site as a block's fused forward sees it: a frozen layer and, where it has one, its LoRA.

y = x Wᵀ + b + s·B A drop(x). ``forward`` and ``backward`` are the two directions of that line, rank first: of LoRA's
own nothing wider than (tokens, r) is made, and its two products are added in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters.base import LINEAR, Adapted, dense_weight
from lowrank.adapters.methods.dropout import drop, mask_of
from lowrank.adapters.methods.lora import LoRA
from lowrank.fast import linear


@dataclass(frozen=True)
class Site:
    """A and B are None where the layer stands bare; p and seed are those of this call's dropout mask."""

    layer: Any  # Linear, Conv1D or NF4Linear, frozen
    A: Tensor | None = None  # (r, in)
    B: Tensor | None = None  # (out, r)
    scale: float = 1.0
    p: float = 0.0
    seed: int = 0


def site(module: nn.Module) -> Site:
    """The parts of a module that ``why_not`` has nothing against."""
    if not isinstance(module, Adapted):
        return Site(module)
    if module.bypassed:
        return Site(module.original)
    p, seed = mask_of(module.adapter)
    lora: Any = module.adapter
    return Site(module.base, lora.A, lora.B, lora.scale, p, seed)


def why_not(module: nn.Module) -> str | None:
    """What keeps a module from being a fused site, or None."""
    layer = module.base if isinstance(module, Adapted) else module
    if isinstance(module, Adapted) and type(module.adapter) is not LoRA:
        return f"{type(module.adapter).__name__} is not plain LoRA"
    if type(layer) not in LINEAR:
        return f"{type(layer).__name__} is not a linear layer"
    if any(p.requires_grad for p in layer.parameters(recurse=False)):
        return "its weights train"
    return None


def tensors(sites: Sequence[Site]) -> list[Tensor | None]:
    """A and B of every site, the inputs of an autograd Function that a gradient goes to."""
    return [tensor for s in sites for tensor in (s.A, s.B)]


def forward(h: Tensor, s: Site, added: Tensor | None = None) -> Tensor:
    """h Wᵀ + b + s·B A drop(h), plus ``added``: h (tokens, in) → (tokens, out), always a new tensor."""
    y = linear.product(h, dense_weight(s.layer), s.layer.bias, added)  # (tokens, out)
    if s.A is not None and s.B is not None:
        hidden = linear.product(dropped(h, s), s.A.to(h.dtype))  # (tokens, r)
        y.addmm_(hidden.to(y.dtype), s.B.to(y.dtype).T, alpha=s.scale)
    return y


def backward(
    grad: Tensor, h: Tensor, s: Site, grad_h: Tensor | None, wanted: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of h (with ``grad_h`` added), A and B, from ``grad`` (tokens, out) and h (tokens, in).

    ``wanted`` tells whether h's own is.
    """
    grad_A = grad_B = None
    if wanted:
        grad_h = linear.product(grad, dense_weight(s.layer).T, None, grad_h)  # (tokens, in)
    if s.A is not None and s.B is not None:
        x, A, B = dropped(h, s), s.A.to(h.dtype), s.B.to(h.dtype)
        rank = linear.product(grad, B.T)  # (tokens, r)
        if s.B.requires_grad:
            grad_B = linear.product(linear.product(x, A).T, grad.T).T.mul(s.scale).to(s.B.dtype)  # (out, r)
        if s.A.requires_grad:
            grad_A = linear.product(rank.T, x.T).mul_(s.scale).to(s.A.dtype)  # (r, in)
        if grad_h is not None and not s.p:
            grad_h.addmm_(rank, A, alpha=s.scale)
        elif grad_h is not None:
            grad_h += drop(linear.product(rank, A.T).mul_(s.scale), s.p, s.seed)
    return grad_h, grad_A, grad_B


def dropped(h: Tensor, s: Site) -> Tensor:
    return drop(h, s.p, s.seed) if s.p else h


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products run in: autocast's dtype inside of it, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
