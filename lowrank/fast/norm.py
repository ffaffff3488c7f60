"""The two norms of decoder blocks with frozen weights, and their gradients: only statistics are kept beside x.

Statistics are fp32, or fp64 for an fp64 model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RMSNorm:
    """h = w ⊙ x·s with s = 1 / √(mean x² + ε) (arXiv 1910.07467)."""

    weight: Tensor  # (d,)
    eps: float
    rounded: bool = True  # x·s to x's dtype before w: as most of transformers' do

    def statistics(self, x: Tensor) -> tuple[Tensor, ...]:
        """s of every row: (rows, d) → (rows, 1)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        return (norms.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_(),)

    def normed(self, x: Tensor, statistics: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        (s,) = statistics
        n = x * s
        return (n.to(x.dtype) if self.rounded else n).mul_(self.weight).to(dtype)

    def gradient(self, grad: Tensor, x: Tensor, statistics: tuple[Tensor, ...]) -> Tensor:
        """With g = w ⊙ ∂L/∂h and n = x·s: ∂L/∂x = s·(g − n·mean(g ⊙ n)); (rows, d)."""
        (s,) = statistics
        wide = x.to(s.dtype)
        g = grad.to(s.dtype) * self.weight
        mean = torch.linalg.vecdot(g, wide).unsqueeze(-1).mul_(s.square()).div_(x.shape[-1])  # mean(g ⊙ n)·s
        return g.addcmul_(wide, mean, value=-1).mul_(s).to(x.dtype)


@dataclass(frozen=True)
class LayerNorm:
    """h = w ⊙ (x − mean)·s + b with s = 1 / √(variance + ε) (arXiv 1607.06450)."""

    weight: Tensor  # (d,)
    bias: Tensor  # (d,)
    eps: float

    def statistics(self, x: Tensor) -> tuple[Tensor, ...]:
        """(mean, s) of every row: (rows, 1) each."""
        variance, mean = torch.var_mean(
            x.to(torch.promote_types(x.dtype, torch.float32)), -1, correction=0, keepdim=True
        )
        return mean, variance.add_(self.eps).rsqrt_()

    def normed(self, x: Tensor, statistics: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        mean, s = statistics
        return x.sub(mean).mul_(s).mul_(self.weight).add_(self.bias).to(dtype)

    def gradient(self, grad: Tensor, x: Tensor, statistics: tuple[Tensor, ...]) -> Tensor:
        """With g = w ⊙ ∂L/∂h and n = (x − mean)·s: ∂L/∂x = s·(g − mean(g) − n·mean(g ⊙ n)); (rows, d)."""
        mean, s = statistics
        n = x.to(s.dtype).sub(mean).mul_(s)
        g = grad.to(s.dtype) * self.weight
        along = torch.linalg.vecdot(g, n).unsqueeze(-1).div_(x.shape[-1])
        return g.sub_(g.mean(-1, keepdim=True)).addcmul_(n, along, value=-1).mul_(s).to(x.dtype)


Norm = RMSNorm | LayerNorm
RMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm", "GemmaRMSNorm")


def norm(module: Any) -> Norm:
    """The values of a module that ``why_not`` has nothing against."""
    match type(module).__name__:
        case "LayerNorm":
            return LayerNorm(module.weight, module.bias, module.eps)
        case "RMSNorm":
            return RMSNorm(module.weight, module.eps, rounded=False)
        case "GemmaRMSNorm":
            return RMSNorm(
                1 + module.weight.to(torch.promote_types(module.weight.dtype, torch.float32)), module.eps, False
            )
        case _:
            return RMSNorm(module.weight, module.variance_epsilon)


def why_not(module: Any) -> str | None:
    """What keeps a module from being one of the two norms, frozen, or None."""
    if type(module) is nn.LayerNorm:
        plain = module.bias is not None and module.weight is not None
    elif type(module) is nn.RMSNorm:
        plain = module.weight is not None and module.eps is not None
    else:
        plain = type(module).__name__ in RMS
    if not plain:
        return f"{type(module).__name__} is not a norm that is known"
    return "it trains" if any(p.requires_grad for p in module.parameters()) else None
