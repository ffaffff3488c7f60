"""LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from lowrank.adapters.base import LINEAR, Adapter, shape
from lowrank.adapters.dropout import drop


class LoRA(Adapter):
    """h = W x + s·B A x, with A (r, in) drawn at random, B (out, r) zero, W frozen.

    s = alpha / r (section 4.1), or alpha / sqrt(r) with ``rslora`` (arXiv 2312.03732), which keeps the size of
    the update the same for every rank. ``dropout`` is applied to x on the adapter's side only. On an embedding
    x is one-hot, so A x is a look-up of A's columns; dropout does not apply there.

    Raises ValueError where r is not positive or dropout is not in [0, 1).
    """

    sites = ("linear", "embedding")

    def __init__(
        self,
        base: nn.Module,
        *,
        generator: torch.Generator,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rslora: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"r: {r} is not allowed; a positive integer.")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
            raise ValueError(f"alpha: {alpha} is not allowed; a positive number.")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"dropout: {dropout} is not allowed; a number from 0 up to, but not including, 1.")
        if not isinstance(rslora, bool):
            raise ValueError(f"rslora: {rslora} is not allowed; true or false.")
        out_features, in_features = shape(base)
        self.r, self.dropout = r, float(dropout)
        self.scale = alpha / math.sqrt(r) if rslora else alpha / r
        bound = 1 / math.sqrt(in_features)  # what nn.Linear itself draws from
        self.A = nn.Parameter(torch.empty(r, in_features).uniform_(-bound, bound, generator=generator))
        self.B = nn.Parameter(torch.zeros(out_features, r))

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        y = base(x)  # (…, out)
        if isinstance(base, nn.Embedding):
            return y + self.scale * F.linear(F.embedding(x, self.A.T.to(y.dtype)), self.B.to(y.dtype))
        p = self.dropout if self.training else 0.0
        seed = self.clock.draw(self.group) if p else 0
        return LowRankUpdate.apply(y, x, self.A, self.B, self.scale, p, seed, owns(base) and y.is_contiguous())

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * (self.B.to(weight.dtype) @ self.A.to(weight.dtype)), bias  # (out, in)

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}, dropout={self.dropout:g}"


def owns(base: nn.Module) -> bool:
    """Whether nobody but the adapter sees the base's output, so that it may be written in place."""
    hooks = base._forward_hooks or base._backward_hooks or base._backward_pre_hooks or _has_any_global_hook()
    return type(base) in LINEAR and not hooks


class LowRankUpdate(torch.autograd.Function):
    """y + s·B A drop(x), keeping x itself and A x (tokens, r): nothing else of the activation's size.

    Autograd's own composition would keep the dropped x, its mask and the cast of x for every site; here q, k and
    v, which read one x, keep that one. Computes in y's dtype, accumulates gradients in the parameters' own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        scale: float,
        p: float,
        seed: int,
        in_place: bool,
    ) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            rows = x.reshape(-1, A.shape[1]).to(y.dtype)  # (tokens, in)
            hidden = (drop(rows, p, seed) if p else rows) @ A.to(y.dtype).T  # (tokens, r)
            sum_ = y if in_place else y.clone(memory_format=torch.contiguous_format)
            flat = sum_.view(-1, B.shape[0])  # (tokens, out)
            flat.addmm_(hidden, B.to(y.dtype).T, alpha=scale)
        if in_place:
            ctx.mark_dirty(y)
        ctx.save_for_backward(x, hidden, A, B)
        ctx.scale, ctx.p, ctx.seed = scale, p, seed
        return sum_

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, A, B = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            g = grad.reshape(-1, B.shape[0])  # (tokens, out)
            grad_hidden = torch.mul(g @ B.to(g.dtype), ctx.scale)  # (tokens, r)
            grad_x = grad_A = grad_B = None
            if ctx.needs_input_grad[3]:
                grad_B = torch.mul(g.T @ hidden, ctx.scale).to(B.dtype)  # (out, r)
            if ctx.needs_input_grad[2]:
                rows = x.reshape(-1, A.shape[1]).to(g.dtype)
                rows = drop(rows, ctx.p, ctx.seed) if ctx.p else rows
                grad_A = (grad_hidden.T @ rows).to(A.dtype)  # (r, in)
            if ctx.needs_input_grad[1]:
                grad_x = grad_hidden @ A.to(g.dtype)  # (tokens, in)
                grad_x = drop(grad_x, ctx.p, ctx.seed) if ctx.p else grad_x
                grad_x = grad_x.view(x.shape).to(x.dtype)
        return grad, grad_x, grad_A, grad_B, None, None, None, None
