"""(IA)³: Infused Adapter by Inhibiting and Amplifying Inner Activations (arXiv 2205.05638)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank.adapters.base import Adapter, shape
from lowrank.adapters.methods.options import flag


class IA3(Adapter):
    """y = l ∘ (W x + b), or with ``feedforward`` y = W (l ∘ x) + b; l starts at ones (section 3.3).

    The paper scales attention's keys and values, which are outputs of their layers, and what the feed-forward's
    activation gives, which is the input of its second layer. Of a layer that makes queries, keys and values in one
    (GPT-2's ``c_attn``) the queries are scaled too: their product with the keys has that freedom anyway.

    Raises ValueError where ``feedforward`` is not a flag.
    """

    def __init__(self, base: nn.Module, *, generator: torch.Generator, feedforward: bool = False) -> None:
        super().__init__()
        out_features, in_features = shape(base)
        self.feedforward = flag("feedforward", feedforward)
        self.scale = nn.Parameter(torch.ones(in_features if feedforward else out_features))

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        if self.feedforward:
            return base(x * self.scale.to(x.dtype))
        y = base(x)  # (…, out)
        return y * self.scale.to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.scale.to(weight.dtype)
        if self.feedforward:
            return weight * scale, bias  # its columns
        return scale[:, None] * weight, None if bias is None else scale * bias

    def extra_repr(self) -> str:
        return f"{self.scale.numel()} {'inputs' if self.feedforward else 'outputs'}"
