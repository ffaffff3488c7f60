"""The autograd Functions of a decoder block, each keeping the least that saves it a matrix product in backward.

Every W is a frozen layer with or without LoRA (site.py). Inputs are rows, (tokens, width).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowrank.fast import site
from lowrank.fast.norm import Norm
from lowrank.fast.site import Site


@dataclass(frozen=True)
class Act:
    """A gate's activation."""

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]  # (∂L/∂act(x), x) → ∂L/∂x


SILU = Act(F.silu, torch.ops.aten.silu_backward)
GELU = Act(partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh"))


class Keep(Enum):
    """What a feed-forward keeps for backward."""

    PRODUCTS = "products"  # what goes into act: no product is computed twice
    INPUT = "input"  # x alone: those products are computed again
    UNREAD = "unread"  # the products, of a forward that is itself a recomputation: its output, unread, has no values


def norm_linears(x: Tensor, norm: Norm, sites: Sequence[Site]) -> tuple[Tensor, ...]:
    """W_i norm(x) of several sites. Keeps x and its statistics; the norm is computed again."""
    return NormLinears.apply(x, norm, sites, *site.tensors(sites))


def normed(x: Tensor, norm: Norm) -> Tensor:
    """norm(x) alone (q's and k's heads, in some models). Keeps x and its statistics."""
    return Normed.apply(x, norm)


def linear_residual(o: Tensor, residual: Tensor, s: Site) -> Tensor:
    """residual + W o. Keeps o."""
    return LinearResidual.apply(o, residual, s, *site.tensors([s]))


def norm_gated(act: Act) -> Callable[..., Tensor]:
    """x + W_down (act(gate) ⊙ up), gate, up = W_gate, W_up norm(x) (arXiv 2002.05202). Keeps x, gate and up.

    Sites are gate, up and down; or one that gives gate and up side by side, and down.
    """

    def rest(x: Tensor, norm: Norm, sites: Sequence[Site], keep: Keep = Keep.PRODUCTS) -> Tensor:
        return NormGated.apply(x, norm, sites, act, keep, *site.tensors(sites))

    return rest


def norm_gelu(x: Tensor, norm: Norm, sites: Sequence[Site], keep: Keep = Keep.PRODUCTS) -> Tensor:
    """x + W_down gelu(up), up = W_up norm(x), with gelu's tanh approximation (arXiv 1606.08415). Keeps x and up."""
    return NormGelu.apply(x, norm, sites, keep, *site.tensors(sites))


class NormLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm, sites: Sequence[Site], *AB: Tensor) -> tuple[Tensor, ...]:
        statistics = norm.statistics(x)
        ctx.save_for_backward(x, *statistics)
        ctx.norm, ctx.sites, ctx.dtype = norm, sites, site.compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            h = norm.normed(x, statistics, ctx.dtype)  # (tokens, d)
            return site.forward(h, sites)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *statistics = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            h = ctx.norm.normed(x, statistics, ctx.dtype)
            grad_h, found = site.backward(grads, h, ctx.sites, ctx.needs_input_grad[0])
            grad_x = None if grad_h is None else ctx.norm.gradient(grad_h, x, statistics)
        return grad_x, None, None, *found


class Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        statistics = norm.statistics(x)
        ctx.save_for_backward(x, *statistics)
        ctx.norm = norm
        return norm.normed(x, statistics, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, *statistics = ctx.saved_tensors
        return ctx.norm.gradient(grad, x, statistics), None


class LinearResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor, residual: Tensor, s: Site, *AB: Tensor) -> Tensor:
        ctx.save_for_backward(o)
        ctx.site, ctx.dtype = s, site.compute_dtype(o)
        with torch.autocast(o.device.type, enabled=False):
            return site.forward(o.to(ctx.dtype), [s], residual)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (o,) = ctx.saved_tensors
        g = grad.to(ctx.dtype)
        with torch.autocast(o.device.type, enabled=False):
            grad_o, AB = site.backward([g], o.to(ctx.dtype), [ctx.site], ctx.needs_input_grad[0])
        return None if grad_o is None else grad_o.to(o.dtype), grad, None, *AB


class NormGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm, sites: Sequence[Site], act: Act, keep: Keep, *AB: Tensor) -> Tensor:
        statistics = norm.statistics(x)
        ctx.norm, ctx.sites, ctx.act, ctx.dtype = norm, sites, act, site.compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            h = norm.normed(x, statistics, ctx.dtype)  # (tokens, d)
            products = site.forward(h, sites[:-1])  # (tokens, f) twice, or (tokens, 2f)
            del h  # before the largest product: it is not kept
            save(ctx, keep, x, statistics, *products)
            if keep is Keep.UNREAD:
                return torch.empty_like(x)
            gate, up = halves(products)
            return site.forward(act.value(gate).mul_(up), sites[-1:], x)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            x, statistics, products = saved(ctx)
            gate, up = halves(products)
            value = ctx.act.value(gate)
            more = ctx.needs_input_grad[0] or trains(ctx.sites[:-1])
            grad_product, down = site.backward([grad.to(ctx.dtype)], value * up, ctx.sites[-1:], more)
            if grad_product is None:  # nothing below this site trains
                return None, None, None, None, None, *[None] * len(site.tensors(ctx.sites[:-1])), *down
            grad_up = value.mul_(grad_product)  # (tokens, f)
            grad_gate = ctx.act.gradient(grad_product.mul_(up), gate)
            read = (grad_gate, grad_up) if len(products) == 2 else (torch.cat([grad_gate, grad_up], -1),)
            del value, grad_product, grad_gate, grad_up
            h = ctx.norm.normed(x, statistics, ctx.dtype)
            grad_h, found = site.backward(read, h, ctx.sites[:-1], ctx.needs_input_grad[0])
            grad_x = None if grad_h is None else ctx.norm.gradient(grad_h, x, statistics).add_(grad)
        return grad_x, None, None, None, None, *found, *down


def trains(sites: Sequence[Site]) -> bool:
    return any(tensor.requires_grad for tensor in site.tensors(sites))


def halves(products: Sequence[Tensor]) -> Sequence[Tensor]:
    """gate and up, (tokens, f) each."""
    return products if len(products) == 2 else products[0].chunk(2, -1)


class NormGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm, sites: Sequence[Site], keep: Keep, *AB: Tensor) -> Tensor:
        statistics = norm.statistics(x)
        ctx.norm, ctx.sites, ctx.dtype = norm, sites, site.compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            (up,) = site.forward(norm.normed(x, statistics, ctx.dtype), sites[:1])  # (tokens, f)
            save(ctx, keep, x, statistics, up)
            if keep is Keep.UNREAD:
                return torch.empty_like(x)
            return site.forward(GELU.value(up), sites[1:], x)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            x, statistics, (up,) = saved(ctx)
            more = ctx.needs_input_grad[0] or trains(ctx.sites[:1])
            grad_act, down = site.backward([grad.to(ctx.dtype)], GELU.value(up), ctx.sites[1:], more)
            if grad_act is None:  # nothing below this site trains
                return None, None, None, None, *[None] * len(site.tensors(ctx.sites[:1])), *down
            grad_up = GELU.gradient(grad_act, up)  # (tokens, f)
            h = ctx.norm.normed(x, statistics, ctx.dtype)
            grad_h, upped = site.backward([grad_up], h, ctx.sites[:1], ctx.needs_input_grad[0])
            grad_x = None if grad_h is None else ctx.norm.gradient(grad_h, x, statistics).add_(grad)
        return grad_x, None, None, None, *upped, *down


def save(ctx: Any, keep: Keep, x: Tensor, statistics: Sequence[Tensor], *products: Tensor) -> None:
    ctx.statistics = len(statistics)
    ctx.save_for_backward(x, *statistics, *(() if keep is Keep.INPUT else products))


def saved(ctx: Any) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """x, its statistics, and the products of all sites but the last: kept, or computed again to the same bits."""
    x, *rest = ctx.saved_tensors
    statistics, products = rest[: ctx.statistics], rest[ctx.statistics :]
    if not products:
        h = ctx.norm.normed(x, statistics, ctx.dtype)  # (tokens, d)
        products = site.forward(h, ctx.sites[:-1])  # (tokens, f) each
    return x, statistics, products
