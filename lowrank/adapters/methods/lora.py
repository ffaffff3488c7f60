"""LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters.base import Adapter, dense_weight
from lowrank.adapters.kind import like, standing_for
from lowrank.adapters.methods.dropout import mask_of
from lowrank.adapters.methods.init import INITS, residual, start
from lowrank.adapters.methods.options import choice, flag, positive_integer, positive_number, probability
from lowrank.adapters.methods.update import LowRankUpdate, owns
from lowrank.quant.nf4 import NF4Linear


class LoRA(Adapter):
    """h = W x + s·B A x, with A (r, in) drawn at random, B (out, r) zero, W frozen.

    s = alpha / r (section 4.1), or alpha / sqrt(r) with ``rslora`` (arXiv 2312.03732), which keeps the size of
    the update the same for every rank. ``dropout`` is applied to x on the adapter's side only. On an embedding
    x is one-hot, so A x is a look-up of A's columns; dropout does not apply there.

    ``init`` is one of those in init.py beside this: default, gaussian, orthogonal, zeros (A zero, B drawn), or pissa,
    olora and loftq, which start from W: the base then becomes W − s·B0 A0 (over NF4 quantised anew; loftq makes an
    NF4 base of a dense one), with A0 and B0 kept in the adapter's file so that the same base is found again.
    ``freeze_a`` trains B alone (LoRA-FA, arXiv 2308.03303): nothing of x's width is then kept for backward.

    Raises ValueError where an option is out of its range or does not go with the base.
    """

    sites = ("linear", "embedding")
    A0: Tensor | None
    B0: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        *,
        generator: torch.Generator,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str = "default",
        freeze_a: bool = False,
    ) -> None:
        super().__init__()
        self.r, alpha = positive_integer("r", r), positive_number("alpha", alpha)
        self.dropout = probability("dropout", dropout)
        self.scale = alpha / math.sqrt(r) if flag("rslora", rslora) else alpha / r
        self.init = choice("init", init, INITS)
        if flag("freeze_a", freeze_a) and init == "zeros":
            raise ValueError("freeze_a: true is not allowed with init=zeros; A would stay zero, and B without effect.")
        begun = start(init, base, r, self.scale, generator)
        self.identity_at_start = begun.identity
        self.A = nn.Parameter(begun.A, requires_grad=not freeze_a)
        self.B = nn.Parameter(begun.B)
        for name, taken in zip(("A0", "B0"), begun.taken or (None, None), strict=True):
            self.register_buffer(name, taken)

    def rebased(self, base: nn.Module) -> nn.Module:
        if self.A0 is None or self.B0 is None:
            return base
        weight, bias = dense_weight(base), getattr(base, "bias", None)
        left = residual(weight, self.A0, self.B0, self.scale)  # (out, in)
        if self.init == "loftq":
            return standing_for(base, NF4Linear.from_dense(left, bias, double=True))
        return like(base, left.to(weight.dtype), bias)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        p, seed = (0.0, 0) if isinstance(base, nn.Embedding) else mask_of(self)
        return self.added(base(x), base, x, p, seed)

    def added(self, y: Tensor, base: nn.Module, x: Tensor, p: float, seed: int) -> Tensor:
        """y + s·B A dropped(x); y (…, out), the base's output, may be written over."""
        if isinstance(base, nn.Embedding):
            return y + self.scale * F.linear(F.embedding(x, self.A.T.to(y.dtype)), self.B.to(y.dtype))
        return LowRankUpdate.apply(y, x, self.A, self.B, self.scale, p, seed, owns(base) and y.is_contiguous())

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return self.A, self.scale * self.B

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * (self.B.to(weight.dtype) @ self.A.to(weight.dtype)), bias  # scaled in its dtype

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}, dropout={self.dropout:g}"
