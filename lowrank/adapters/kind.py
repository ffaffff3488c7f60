"""A module of a base's own kind that holds another weight."""

from __future__ import annotations

import copy
from types import MethodType

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank.quant.nf4 import NF4Linear


def like(base: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A frozen module of the base's own kind (Linear, Conv1D, Embedding, a subclass of these, or NF4Linear) in the
    base's mode that holds ``weight`` (out, in), quantised anew for NF4, and ``bias``, in their own dtypes.

    It shares no tensor with the base and none of its hooks. A ``forward`` set on the base's instance (a faster one)
    is set on the new one too.
    """
    if isinstance(base, NF4Linear):
        return standing_for(base, quantised(base, weight, bias))
    return standing_for(base, dense(base, weight, bias))


def standing_for(base: nn.Module, new: nn.Module) -> nn.Module:
    """``new`` in the base's mode, and with its faster ``forward``."""
    faster = vars(base).get("forward")
    if isinstance(faster, MethodType):
        vars(new)["forward"] = MethodType(faster.__func__, new)
    return new.train(base.training)


def quantised(base: NF4Linear, weight: Tensor, bias: Tensor | None) -> NF4Linear:
    kept = None if bias is None else bias.detach().clone()
    return NF4Linear.from_dense(weight, kept, double=base.double_quantized, compute_dtype=base.compute_dtype)


def dense(base: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    new = copy.copy(base)
    for name, held in vars(base).items():  # a shallow copy shares them with the base: it gets its own
        if name in ("_parameters", "_buffers", "_modules"):
            vars(new)[name] = dict(held)
        elif name.endswith("_hooks"):
            vars(new)[name] = type(held)()
    values = weight.detach().T if isinstance(base, (Conv1D, nn.Embedding)) else weight.detach()
    new._parameters["weight"] = nn.Parameter(values.clone(memory_format=torch.contiguous_format), requires_grad=False)
    if bias is not None:
        new._parameters["bias"] = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return new
