"""Rotary position embedding (arXiv 2104.09864) that keeps nothing but the angles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Rotary(torch.autograd.Function):
    """(x₁, x₂) → (x₁ cos − x₂ sin, x₂ cos + x₁ sin) of the two halves of every head, a rotation: its gradient turns
    the other way. x (batch, heads, seq, width) may be a view; cos and sin (batch, seq, width or less), their halves
    equal.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return turned(grad, cos, -sin), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A new tensor of x's shape and strides; of heads that are wider than the angles the rest stays as it is."""
    half = cos.shape[-1] // 2
    cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]  # (batch, 1, seq, half)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    if torch.compiler.is_compiling():  # which makes one kernel of it by itself
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).to(x.dtype)
    y = torch.empty_like(x)
    if cos.dtype == x.dtype:
        torch.mul(first, cos, out=y[..., :half]).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=y[..., half : 2 * half]).addcmul_(first, sin)
    else:  # angles are finer than x: rounded once, at the end
        y[..., :half] = (first * cos).sub_(second * sin)
        y[..., half : 2 * half] = (second * cos).add_(first * sin)
    y[..., 2 * half :] = rest
    return y
