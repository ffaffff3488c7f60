"""The autograd Functions of a decoder block, each keeping the least that saves it a matrix product in backward.

Every W is a frozen layer with or without LoRA (site.py). Inputs are rows, (tokens, width).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowrank.fast import site
from lowrank.fast.norm import Norm
from lowrank.fast.site import Site


def norm_linears(x: Tensor, norm: Norm, sites: Sequence[Site]) -> tuple[Tensor, ...]:
    """W_i norm(x) of several sites. Keeps x and its statistics; the norm is computed again."""
    return NormLinears.apply(x, norm, sites, *site.tensors(sites))


def linear_residual(o: Tensor, residual: Tensor, s: Site) -> Tensor:
    """residual + W o. Keeps o."""
    return LinearResidual.apply(o, residual, s, *site.tensors([s]))


def norm_gated(x: Tensor, norm: Norm, sites: Sequence[Site]) -> Tensor:
    """x + W_down (silu(gate) ⊙ up), gate, up = W_gate, W_up norm(x) (arXiv 2002.05202). Keeps x, gate and up."""
    return NormGated.apply(x, norm, sites, *site.tensors(sites))


def norm_gelu(x: Tensor, norm: Norm, sites: Sequence[Site]) -> Tensor:
    """x + W_down gelu(up), up = W_up norm(x), with gelu's tanh approximation (arXiv 1606.08415). Keeps x and up."""
    return NormGelu.apply(x, norm, sites, *site.tensors(sites))


class NormLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm, sites: Sequence[Site], *AB: Tensor) -> tuple[Tensor, ...]:
        statistics = norm.statistics(x)
        ctx.save_for_backward(x, *statistics)
        ctx.norm, ctx.sites, ctx.dtype = norm, sites, site.compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            h = norm.normed(x, statistics, ctx.dtype)  # (tokens, d)
            return tuple(site.forward(h, s) for s in sites)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *statistics = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            h = ctx.norm.normed(x, statistics, ctx.dtype)
            grad_h, found = None, []
            for grad, s in zip(grads, ctx.sites, strict=True):
                grad_h, *AB = site.backward(grad, h, s, grad_h, ctx.needs_input_grad[0])
                found += AB
            grad_x = None if grad_h is None else ctx.norm.gradient(grad_h, x, statistics)
        return grad_x, None, None, *found


class LinearResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor, residual: Tensor, s: Site, *AB: Tensor) -> Tensor:
        ctx.save_for_backward(o)
        ctx.site, ctx.dtype = s, site.compute_dtype(o)
        with torch.autocast(o.device.type, enabled=False):
            return site.forward(o.to(ctx.dtype), s, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (o,) = ctx.saved_tensors
        g = grad.to(ctx.dtype)
        with torch.autocast(o.device.type, enabled=False):
            grad_o, *AB = site.backward(g, o.to(ctx.dtype), ctx.site, None, ctx.needs_input_grad[0])
        return None if grad_o is None else grad_o.to(o.dtype), grad, None, *AB


class NormGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm, sites: Sequence[Site], *AB: Tensor) -> Tensor:
        statistics = norm.statistics(x)
        ctx.norm, ctx.sites, ctx.dtype = norm, sites, site.compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            h = norm.normed(x, statistics, ctx.dtype)  # (tokens, d)
            gate, up = (site.forward(h, s) for s in sites[:2])  # (tokens, f) each
            del h  # before the largest product: it is not kept
            ctx.save_for_backward(x, gate, up, *statistics)
            return site.forward(F.silu(gate).mul_(up), sites[2], x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, gate, up, *statistics = ctx.saved_tensors
        of_gate, of_up, of_down = ctx.sites
        with torch.autocast(x.device.type, enabled=False):
            silu = F.silu(gate)
            product, *down = site.backward(grad.to(ctx.dtype), silu * up, of_down, None, True)
            assert product is not None
            grad_up = silu.mul_(product)  # (tokens, f)
            grad_gate = torch.ops.aten.silu_backward(product.mul_(up), gate)
            h = ctx.norm.normed(x, statistics, ctx.dtype)
            grad_h, *gated = site.backward(grad_gate, h, of_gate, None, ctx.needs_input_grad[0])
            grad_h, *upped = site.backward(grad_up, h, of_up, grad_h, ctx.needs_input_grad[0])
            grad_x = None if grad_h is None else grad + ctx.norm.gradient(grad_h, x, statistics)
        return grad_x, None, None, *gated, *upped, *down


class NormGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm, sites: Sequence[Site], *AB: Tensor) -> Tensor:
        statistics = norm.statistics(x)
        ctx.norm, ctx.sites, ctx.dtype = norm, sites, site.compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            up = site.forward(norm.normed(x, statistics, ctx.dtype), sites[0])  # (tokens, f)
            ctx.save_for_backward(x, up, *statistics)
            return site.forward(F.gelu(up, approximate="tanh"), sites[1], x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, up, *statistics = ctx.saved_tensors
        of_up, of_down = ctx.sites
        with torch.autocast(x.device.type, enabled=False):
            act = F.gelu(up, approximate="tanh")
            product, *down = site.backward(grad.to(ctx.dtype), act, of_down, None, True)
            grad_up = torch.ops.aten.gelu_backward(product, up, approximate="tanh")  # (tokens, f)
            h = ctx.norm.normed(x, statistics, ctx.dtype)
            grad_h, *upped = site.backward(grad_up, h, of_up, None, ctx.needs_input_grad[0])
            grad_x = None if grad_h is None else grad + ctx.norm.gradient(grad_h, x, statistics)
        return grad_x, None, None, *upped, *down
