"""DoRA: Weight-Decomposed Low-Rank Adaptation (arXiv 2402.09353)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank.adapters.base import dense_weight
from lowrank.adapters.methods.dropout import Dropped, mask_of
from lowrank.adapters.methods.lora import LoRA


class DoRA(LoRA):
    """h = m/n ∘ (W + s·B A) x + b, with n (out,) the norms of the rows of W + s·B A and m (out,) those of W at first.

    LoRA learns the direction of each row, m (``magnitude``) its length. n is a constant to the gradient (section 4.3)
    and computed anew at each call, without keeping W + s·B A. At the start m/n is 1 exactly, so h is the base's own.

    With y = W x + b + s·B A x, LoRA's output, it is h = y + (m/n − 1) ∘ (y − b). ``dropout`` is that of the authors'
    code: the second y, and of the first y the A x, read dropped(x). It costs a second product with W. On an embedding
    a row of W is one feature over the whole vocabulary.
    """

    gradient_leaves_out = ("A", "B")  # what n would add

    def __init__(
        self,
        base: nn.Module,
        *,
        generator: torch.Generator,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rslora: bool = False,
    ) -> None:
        super().__init__(base, generator=generator, r=r, alpha=alpha, dropout=dropout, rslora=rslora)
        self.magnitude = nn.Parameter(row_norms(dense_weight(base), *self.scaled()))

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        p, seed = (0.0, 0) if isinstance(base, nn.Embedding) else mask_of(self)
        y = self.added(base(x), base, x, p, seed)  # (…, out)
        seen = self.added(base(Dropped.apply(x, p, seed)), base, x, p, seed) if p else y
        with torch.autocast(x.device.type, enabled=False):
            norms = row_norms(dense_weight(base), *self.scaled())
        longer = (self.magnitude / norms - 1).to(y.dtype)  # (out,)
        bias = getattr(base, "bias", None)
        return y + longer * (seen if bias is None else seen - bias.to(y.dtype))

    def factors(self) -> None:
        return None  # B A is not all of it

    def scaled(self) -> tuple[Tensor, Tensor]:
        return self.A, self.scale * self.B

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B = (factor.to(weight) for factor in self.scaled())
        gain = self.magnitude.to(weight) / row_norms(weight, A, B)  # (out,)
        return gain[:, None] * (weight + B @ A), bias


@torch.no_grad()
def row_norms(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """‖W + B A‖ of each row: (out,) in A's dtype, fp32 at least. A row of zeros has fp32's least norm above 0."""
    wide = torch.promote_types(A.dtype, torch.float32)
    W, A, B = (matrix.to(weight.device, wide) for matrix in (weight, A, B))
    return torch.linalg.vector_norm(torch.addmm(W, B, A), dim=1).clamp_min(torch.finfo(torch.float32).tiny)
