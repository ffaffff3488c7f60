"""VeRA: Vector-based Random Matrix Adaptation (arXiv 2310.11454)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters.base import Adapter, shape
from lowrank.adapters.methods.dropout import mask_of
from lowrank.adapters.methods.options import positive_integer, positive_number, probability
from lowrank.adapters.methods.update import LowRankUpdate, owns


class VeRA(Adapter):
    """h = W x + b ∘ B (d ∘ A x), with A (r, in) and B (out, r) random, frozen and the same for all sites.

    Only d (r,), ``d_initial`` at first, and b (out,), zero, train. One A (r, widest in) and one B (widest out, r),
    both Kaiming-uniform, are drawn for all sites of a rule; a site takes the first columns of A and rows of B that it
    needs. ``dropout`` is applied to x on the adapter's side only. Nothing of x's width is kept for backward.

    Raises ValueError where r or d_initial is not positive or dropout is not in [0, 1).
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        generator: torch.Generator,
        r: int = 256,
        d_initial: float = 0.1,
        dropout: float = 0.0,
        shared_A: nn.Parameter,
        shared_B: nn.Parameter,
    ) -> None:
        super().__init__()
        out, self.into = shape(base)
        self.r, self.dropout = positive_integer("r", r), probability("dropout", dropout)
        self.A, self.B = shared_A, shared_B
        self.d = nn.Parameter(torch.full((r,), float(positive_number("d_initial", d_initial))))
        self.b = nn.Parameter(torch.zeros(out))

    @classmethod
    def shared(
        cls, shapes: dict[str, tuple[int, int]], *, generator: torch.Generator, r: int = 256, **options: Any
    ) -> dict[str, Any]:
        out, into = (max(sizes) for sizes in zip(*shapes.values(), strict=True))
        positive_integer("r", r)
        return {"shared_A": kaiming(r, into, generator), "shared_B": kaiming(out, r, generator)}

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        y, (A, B), (p, seed) = base(x), self.factors(), mask_of(self)
        return LowRankUpdate.apply(y, x, A, B, 1.0, p, seed, owns(base) and y.is_contiguous())

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A[:, : self.into], torch.outer(self.b, self.d) * self.B[: self.b.shape[0]]  # (r, in), (out, r)

    def extra_repr(self) -> str:
        return f"r={self.r}, dropout={self.dropout:g}"


def kaiming(rows: int, columns: int, generator: torch.Generator) -> nn.Parameter:
    """Uniform within √(6 / columns) (arXiv 1502.01852)."""
    bound = math.sqrt(6 / columns)
    drawn = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
    return nn.Parameter(drawn, requires_grad=False)
