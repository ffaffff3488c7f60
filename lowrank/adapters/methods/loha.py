"""LoHa: low rank by a Hadamard product (FedPara, arXiv 2108.06098; as an adapter, LyCORIS, arXiv 2309.14859)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank.adapters.base import Adapter, shape
from lowrank.adapters.methods.options import positive_integer, positive_number
from lowrank.adapters.methods.update import LowRankUpdate, owns


class LoHa(Adapter):
    """h = W x + s·((B₁ A₁) ∘ (B₂ A₂)) x, with A₁, A₂ (r, in) and B₁, B₂ (out, r); s = alpha / r.

    The rank of ΔW is up to r² for the parameters of two LoRAs of rank r (proposition 1 of FedPara). ΔW is never
    built: entry by entry Σᵢ b₁ᵢ a₁ᵢ · Σⱼ b₂ⱼ a₂ⱼ = Σᵢⱼ (b₁ᵢ b₂ⱼ)(a₁ᵢ a₂ⱼ), which is B A with the r² products of
    rows of A₁ and A₂ as A, of columns of B₁ and B₂ as B. B₂ is zero at the start, the others normal draws as in
    LyCORIS (deviation 1, B₁ 0.1).

    Raises ValueError where r or alpha is not positive.
    """

    def __init__(self, base: nn.Module, *, generator: torch.Generator, r: int = 8, alpha: float = 1.0) -> None:
        super().__init__()
        out_features, in_features = shape(base)
        self.r = positive_integer("r", r)
        self.scale = positive_number("alpha", alpha) / r
        self.A1 = nn.Parameter(torch.empty(r, in_features).normal_(generator=generator))
        self.B1 = nn.Parameter(torch.empty(out_features, r).normal_(std=0.1, generator=generator))
        self.A2 = nn.Parameter(torch.empty(r, in_features).normal_(generator=generator))
        self.B2 = nn.Parameter(torch.zeros(out_features, r))

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        y = base(x)  # (…, out)
        A, B = self.factors()
        return LowRankUpdate.apply(y, x, A, B, 1.0, 0.0, 0, owns(base) and y.is_contiguous())

    def factors(self) -> tuple[Tensor, Tensor]:
        A = (self.A1[:, None] * self.A2).flatten(0, 1)  # (r², in)
        B = (self.B1[:, :, None] * self.B2[:, None]).flatten(1)  # (out, r²)
        return A, self.scale * B

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}"
