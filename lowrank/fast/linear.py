"""Frozen linear layers on a CPU through oneDNN.

y = x Wᵀ + b, in fp32. PyTorch's own product is MKL's, which keeps its fast kernels for Intel's CPUs; on others
oneDNN, which PyTorch carries too but uses for fp32 in compiled graphs only, is about twice as fast. The layer keeps
its class, parameters and names: ``fuse`` sets ``forward`` on the instance, ``unfuse`` deletes it.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank.adapters.base import LINEAR, dense_weight


def fuse(model: nn.Module) -> str:
    """Takes the linear-like layers (dense, Conv1D, NF4) where that pays; returns what it did, or why not. One whose
    weight trains is taken where no gradient is wanted alone."""
    why_not = cannot()
    if why_not:
        return f"linear layers plain ({why_not})"
    layers = [m for m in model.modules() if type(m) in LINEAR]
    for layer in layers:
        layer.forward = MethodType(forward, layer)
    training = sum(trains(layer) for layer in layers)
    plain = f", {training} plain (they train)" if training else ""
    return f"{len(layers) - training} linear layers through oneDNN{plain}"


def unfuse(model: nn.Module) -> None:
    for module in model.modules():
        vars(module).pop("forward", None)


@cache
def cannot() -> str | None:
    """Why oneDNN would not be the better choice here, or None: by capability, never by a stopwatch."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch has no oneDNN"
    if not torch.backends.mkl.is_available():
        return "this PyTorch's own products are not MKL's"
    if "AuthenticAMD" not in cpu():
        return "MKL's own kernels suit this CPU"
    return None


def cpu() -> str:
    """What the system says of the processor; empty where it does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return file.read(4096)
    except OSError:
        return ""


def forward(self: Any, x: Tensor) -> Tensor:
    """In place of the layer's own: that one where its weight wants a gradient, or the numbers are not fp32 on a CPU."""
    wanted = torch.is_grad_enabled() and trains(self)
    if wanted or x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return type(self).forward(self, x)
    if getattr(self, "compute_dtype", None) not in (None, torch.float32) or dense_dtype(self) != torch.float32:
        return type(self).forward(self, x)
    return FrozenLinear.apply(x, self)


def trains(layer: nn.Module) -> bool:
    return any(p.requires_grad for p in layer.parameters(recurse=False))


def dense_dtype(layer: Any) -> torch.dtype:
    """The dtype that its weight comes out in: an NF4 weight in any that is asked for."""
    return layer.weight.dtype if hasattr(layer, "weight") else torch.float32


class FrozenLinear(torch.autograd.Function):
    """x Wᵀ + b with W frozen: nothing is kept, an NF4 weight is dequantised again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        weight = dense_weight(layer)  # (out, in)
        y = product(x.reshape(-1, weight.shape[1]), weight, layer.bias)  # (tokens, out)
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], weight.shape[0]])  # no view: an adapter adds in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        weight = dense_weight(ctx.layer)  # (out, in)
        grad_x = product(grad.reshape(-1, weight.shape[0]), weight.T, None)  # (tokens, in)
        return grad_x.view(*grad.shape[:-1], weight.shape[1]), None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, added: Tensor | None = None) -> Tensor:
    """x Wᵀ + b + added, (rows, in) by (out, in) → (rows, out), a new tensor: by oneDNN where that pays."""
    if through_onednn(x, weight):
        if added is not None and added.dtype == x.dtype:
            return torch.ops.mkldnn._linear_pointwise.binary(x, added, weight, bias, "add")
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    elif added is not None and added.dtype == x.dtype and bias is None:
        return torch.addmm(added, x, weight.to(x.dtype).T)
    else:
        y = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y if added is None else added + y


def through_onednn(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or x.device.type != "cpu" or cannot() is not None:
        return False
    return x.dtype == weight.dtype == torch.float32
