"""The low-rank update that several methods share: y + s·B A x, keeping little for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from lowrank.adapters.base import LINEAR
from lowrank.adapters.methods.dropout import drop


def owns(base: nn.Module) -> bool:
    """Whether nobody but the adapter sees the base's output, so that it may be written in place."""
    hooks = base._forward_hooks or base._backward_hooks or base._backward_pre_hooks or _has_any_global_hook()
    return type(base) in LINEAR and not hooks


class LowRankUpdate(torch.autograd.Function):
    """y + s·B A drop(x), keeping x itself and A x (tokens, r): nothing else of the activation's size.

    Autograd's own composition would keep the dropped x, its mask and the cast of x for every site; here q, k and
    v, which read one x, keep that one, and where A is frozen not even that one. Computes in y's dtype, accumulates
    gradients in the parameters' own.
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
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, hidden, A, B)
        ctx.shape, ctx.dtype = x.shape, x.dtype
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
                grad_x = grad_x.view(ctx.shape).to(ctx.dtype)
        return grad, grad_x, grad_A, grad_B, None, None, None, None


class Recomputed(torch.autograd.Function):
    """function(x, *parameters), keeping these alone: what is between them is computed again in backward.

    x is kept as it comes, whatever the function casts it to, so that sites which read one x keep that one. The
    function says itself in which dtype it computes: autocast is off inside.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        ctx.function = function
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        given = [t.detach().requires_grad_(want) for t, want in zip(ctx.saved_tensors, wanted, strict=True)]
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            y = ctx.function(*given)
        found = iter(torch.autograd.grad(y, [t for t in given if t.requires_grad], grad))
        return None, *(next(found) if want else None for want in wanted)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products of x run in: autocast's dtype inside of it, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
