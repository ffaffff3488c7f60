"""Bottleneck adapters (arXiv 1902.00751 by Houlsby et al.; with one a layer, arXiv 2005.00247 by Pfeiffer et al.)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters.base import Adapter, shape
from lowrank.adapters.methods.options import choice, positive_integer

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


class Bottleneck(Adapter):
    """h' = h + U act(D h + d) + u of what a site returns, with D (m, width) drawn at random, U and both biases zero.

    The site says which of the published kinds it is: behind attention's output layer and behind the feed-forward's
    second one, before the residual sums, it is Houlsby's (section 2.1); behind the second alone, Pfeiffer's; on a
    block it follows the whole block. ``size`` is m.

    Raises ValueError where size is not positive or the activation is not known.
    """

    sites = ("linear", "block")

    def __init__(
        self, base: nn.Module, *, generator: torch.Generator, size: int = 64, activation: str = "gelu"
    ) -> None:
        super().__init__()
        width = shape(base)[0]
        self.size = positive_integer("size", size)
        self.activation = choice("activation", activation, list(ACTIVATIONS))
        bound = 1 / math.sqrt(width)  # what nn.Linear itself draws from
        self.down = nn.Parameter(torch.empty(size, width).uniform_(-bound, bound, generator=generator))
        self.down_bias = nn.Parameter(torch.zeros(size))
        self.up = nn.Parameter(torch.zeros(width, size))
        self.up_bias = nn.Parameter(torch.zeros(width))

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = base(*args, **kwargs)
        if isinstance(found, tuple):  # a block's hidden states come first, then its cache or its attention
            return self.added(found[0]), *found[1:]
        return self.added(found)

    def added(self, h: Tensor) -> Tensor:
        down, down_bias, up, up_bias = (p.to(h.dtype) for p in (self.down, self.down_bias, self.up, self.up_bias))
        inner = ACTIVATIONS[self.activation](F.linear(h, down, down_bias))  # (…, m)
        return h + F.linear(inner, up, up_bias)  # (…, width)

    def extra_repr(self) -> str:
        return f"size={self.size}, activation={self.activation}"
