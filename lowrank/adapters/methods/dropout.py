"""Dropout that is drawn again in backward instead of being kept.

Which entries drop depends on one seed alone (``Clock.draw``): the positions are drawn as geometric gaps
between drops, an exact Bernoulli draw that costs p·n numbers rather than n, and the backward pass draws
the same ones again. Nothing of the activation's size is stored.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def dropped_positions(n: int, p: float, seed: int, device: torch.device) -> Tensor:
    """Indices into n entries, each dropped independently with probability p: (≈ p·n,) ascending int64."""
    generator = torch.Generator().manual_seed(seed)
    expected = n * p
    chunk = int(expected + 6 * math.sqrt(expected + 1)) + 16
    pieces, last = [], -1
    while last < n:
        gaps = torch.empty(chunk, dtype=torch.float64).geometric_(p, generator=generator)
        pieces.append(gaps.cumsum(0).to(torch.int64) + last)
        last = int(pieces[-1][-1])
    positions = torch.cat(pieces)
    return positions[positions < n].to(device)


def drop(x: Tensor, p: float, seed: int) -> Tensor:
    """x with its dropped entries zero and the others divided by 1 − p; always a new tensor."""
    kept = x.div(1 - p).contiguous()
    kept.view(-1).index_fill_(0, dropped_positions(x.numel(), p, seed, x.device), 0.0)
    return kept


def mask_of(adapter: Any) -> tuple[float, int]:
    """The probability and the seed of an adapter's mask in this call; (0, 0) in evaluation mode."""
    p = adapter.dropout if adapter.training else 0.0
    return p, adapter.clock.draw(adapter.group) if p else 0


class Dropped(torch.autograd.Function):
    """``drop`` with a gradient: it drops the same entries and keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed = p, seed
        return drop(x, p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return drop(grad, ctx.p, ctx.seed), None, None
