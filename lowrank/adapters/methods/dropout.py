"""Dropout that is drawn again in backward instead of being kept.

Which entries drop depends on one seed alone (``Clock.draw``): the positions are drawn as geometric gaps
between drops, an exact Bernoulli draw that costs p·n numbers rather than n, and the backward pass draws
the same ones again. Nothing of the activation's size is stored. On CUDA, where n numbers cost less than a copy of
p·n from the host, the device draws an entry at a time: its masks are others than a CPU's, and repeat as exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable


@lru_cache(maxsize=1)  # sites that share a mask follow one another: it is drawn once for all of them
def dropped_positions(n: int, p: float, seed: int, device: torch.device) -> Tensor:
    """Indices into n entries, each dropped independently with probability p: (≈ p·n,) ascending int64, to read."""
    generator = torch.Generator().manual_seed(seed)
    expected = n * p
    chunk = int(expected + 6 * math.sqrt(expected + 1)) + 16
    pieces, last = [], -1
    while last < n:
        gaps = torch.empty(chunk, dtype=torch.float64).geometric_(p, generator=generator)
        pieces.append(gaps.cumsum(0).to(torch.int64) + last)
        last = int(pieces[-1][-1])
    positions = torch.cat(pieces)
    return positions[: int(torch.searchsorted(positions, n))].to(device)


@dataclass(frozen=True)
class Positions:
    """A mask as the indices of what it drops: costs p of the entries that it is used on."""

    dropped: Tensor  # (≈ p·n,) int64

    def zero_(self, x: Tensor) -> Tensor:
        """Drops, in place; x is contiguous."""
        x.view(-1).index_fill_(0, self.dropped, 0.0)
        return x

    @contextmanager
    def zeroed(self, x: Tensor) -> Iterator[Tensor]:
        """x without what is dropped, in x's own memory, which afterwards is as before: autograd (by ``data``) does not
        count that as writing. x is contiguous."""
        flat = x.data.view(-1)
        before = flat.index_select(0, self.dropped)
        flat.index_fill_(0, self.dropped, 0.0)
        try:
            yield x
        finally:
            flat.index_copy_(0, self.dropped, before)

    @contextmanager
    def outside(self, x: Tensor) -> Iterator[None]:
        """What is written to x here stays where nothing is dropped; x is contiguous."""
        flat = x.detach().view(-1)
        before = flat.index_select(0, self.dropped)
        yield
        flat.index_copy_(0, self.dropped, before)


@dataclass(frozen=True)
class Entries:
    """A mask entry by entry, drawn where x is."""

    dropped: Tensor  # (n,) bool

    @classmethod
    def draw(cls, n: int, p: float, seed: int, device: torch.device) -> Entries:
        generator = torch.Generator(device).manual_seed(seed)
        return cls(torch.empty(n, dtype=torch.bool, device=device).bernoulli_(p, generator=generator))

    def zero_(self, x: Tensor) -> Tensor:
        x.view(-1).masked_fill_(self.dropped, 0.0)
        return x

    @contextmanager
    def zeroed(self, x: Tensor) -> Iterator[Tensor]:
        yield x.masked_fill(self.dropped.view(x.shape), 0.0)

    @contextmanager
    def outside(self, x: Tensor) -> Iterator[None]:
        before = x.clone()
        yield
        x.copy_(torch.where(self.dropped.view(x.shape), before, x))


Mask = Positions | Entries


def mask(x: Tensor, p: float, seed: int) -> Mask:
    """Of x's entries; where x has no values (a ledger's step), as many positions as are expected."""
    if isinstance(x, FakeTensor):
        return Positions(x.new_empty(round(p * x.numel()), dtype=torch.int64))
    if x.device.type == "cuda":
        return Entries.draw(x.numel(), p, seed, x.device)
    return Positions(dropped_positions(x.numel(), p, seed, x.device))


def drop(x: Tensor, p: float, seed: int) -> Tensor:
    """x with its dropped entries zero and the others divided by 1 − p; always a new tensor."""
    return mask(x, p, seed).zero_(x.div(1 - p).contiguous())


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
