"""LoKr: low rank by a Kronecker product (LyCORIS, arXiv 2309.14859)."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters.base import Adapter, shape
from lowrank.adapters.methods.options import positive_integer, positive_number
from lowrank.adapters.methods.update import Recomputed


class LoKr(Adapter):
    """h = W x + s·(C ⊗ D) x, with C (a, c), D (b, d), out = a·b and in = c·d; s = alpha / r.

    ``factor`` is a, and c, where it divides out, and in; else these are the largest divisors up to it and up to the
    root. Without a factor they are the largest up to the root. D is B A of rank r where r < max(b, d) / 2, else one
    matrix (LyCORIS's rule). At the start C and A are drawn at random, D or B is zero. ΔW is never built: with X (c, d)
    for x, (C ⊗ D) x is C X Dᵀ (a, b).

    Raises ValueError where r, alpha or factor is not positive.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        generator: torch.Generator,
        r: int = 8,
        alpha: float = 8.0,
        factor: int | None = None,
    ) -> None:
        super().__init__()
        factor = None if factor is None else positive_integer("factor", factor)
        (a, b), (c, d) = (divided(size, factor) for size in shape(base))
        self.scale = positive_number("alpha", alpha) / positive_integer("r", r)
        self.C = nn.Parameter(uniform(a, c, generator))
        if r < max(b, d) / 2:
            self.A, self.B = nn.Parameter(uniform(r, d, generator)), nn.Parameter(torch.zeros(b, r))
        else:
            self.D = nn.Parameter(torch.zeros(b, d))

    def right(self) -> tuple[Tensor | None, Tensor]:
        """D as B A: (A (r, d), B (b, r)), or (None, D (b, d))."""
        return (None, self.D) if hasattr(self, "D") else (self.A, self.B)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        y = base(x)  # (…, out)
        A, B = self.right()
        return y + Recomputed.apply(partial(product, self.scale, y.dtype), x, self.C, B, *([] if A is None else [A]))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B = self.right()
        D = B if A is None else B @ A  # (b, d)
        return weight + self.scale * torch.kron(self.C, D).to(weight.dtype), bias

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.right()
        A = torch.eye(B.shape[1], dtype=B.dtype, device=B.device) if A is None else A
        one = torch.eye(self.C.shape[1], dtype=B.dtype, device=B.device)
        return torch.kron(one, A), self.scale * torch.kron(self.C, B)  # C ⊗ B A = (C ⊗ B)(I ⊗ A)

    def extra_repr(self) -> str:
        return f"C {tuple(self.C.shape)}, scale={self.scale:g}"


def product(scale: float, dtype: torch.dtype, x: Tensor, C: Tensor, B: Tensor, A: Tensor | None = None) -> Tensor:
    """s·(C ⊗ B A) x, or s·(C ⊗ B) x without an A, in ``dtype``: (…, in) → (…, out)."""
    X = x.to(dtype).unflatten(-1, (C.shape[1], -1))  # (…, c, d)
    X = X if A is None else F.linear(X, A.to(dtype))  # (…, c, r)
    # Contiguous: for other inputs PyTorch picks another product where gradients are asked for, with other rounding.
    X = F.linear(X.mT.contiguous(), scale * C.to(dtype)).mT.contiguous()  # (…, a, r or d)
    return F.linear(X, B.to(dtype)).flatten(-2)  # (…, out)


def divided(size: int, factor: int | None) -> tuple[int, int]:
    """Two numbers whose product is ``size``, the smaller one first unless ``factor`` is the first."""
    if factor is not None and size % factor == 0:
        return factor, size // factor
    most = min(math.isqrt(size), factor or size)
    first = next(n for n in range(most, 0, -1) if size % n == 0)
    return first, size // first


def uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """What nn.Linear itself draws from."""
    bound = 1 / math.sqrt(columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
