"""What LoRA adds to the outputs of linear sites that read one input, and its gradients.

y_i += s_i·B_i A_i drop(x). Updates that read the same are taken together: ``Group``, one after another, or ``Slice``,
those of one of several runs that train in one pass, on its own rows of x with their A's stacked into one matrix: there
are as many groups as runs, each of few rows, so that the number of products is what counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowrank.adapters.methods.dropout import Mask, mask
from lowrank.fast import linear


@dataclass(frozen=True)
class Update:
    """A LoRA in one call: p and seed are those of its dropout mask."""

    A: Tensor  # (r, in), what a gradient goes to …
    B: Tensor  # (out, r)
    a: Tensor  # … and the same in the dtype of products
    b: Tensor
    scale: float
    p: float
    seed: int
    rows: slice | None = None  # of its input, those that it reads; None: all
    hidden: list[Tensor] = field(default_factory=list)  # A drop(x) of the last forward, where a slice keeps it

    @property
    def factor(self) -> float:
        return self.scale / (1 - self.p)

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Member:
    """An update at its site, and the place of its A and B among the tensors of all."""

    update: Update
    site: int
    place: int


@dataclass(frozen=True)
class Group:
    """The updates that read x with the same entries dropped."""

    members: list[Member]
    dropped: Mask | None

    def add(self, h: Tensor, ys: Sequence[Tensor]) -> None:
        """To the outputs of the sites, in place: h (tokens, in), ys (tokens, out)."""
        with read(h, self.dropped) as z:
            for one in self.members:
                u = one.update
                ys[one.site].addmm_(linear.product(z, u.a), u.b.T, alpha=u.factor)  # (tokens, r) → (tokens, out)

    def back(self, grads: Sequence[Tensor], h: Tensor, grad_h: Tensor | None, found: list[Tensor | None]) -> None:
        """From the sites' gradients (tokens, out): those of A and B into ``found``, and h's own added to ``grad_h``."""
        ranks = [linear.product(grads[one.site], one.update.b.T) for one in self.members]  # (tokens, r) each
        with read(h, self.dropped) as z:
            for one, rank in zip(self.members, ranks, strict=True):
                found[one.place : one.place + 2] = of_factors(one.update, z, grads[one.site], rank)
        if grad_h is not None:
            with outside(grad_h, self.dropped):
                for one, rank in zip(self.members, ranks, strict=True):
                    grad_h.addmm_(rank, one.update.a, alpha=one.update.factor)


def of_factors(u: Update, z: Tensor, grad: Tensor, rank: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """∂L/∂A = s·(g B)ᵀ z and ∂L/∂B = s·gᵀ (A z), of those that train; z (tokens, in), ``rank`` = g B (tokens, r)."""
    grad_A = grad_B = None
    if u.A.requires_grad:
        grad_A = linear.product(rank.T, z.T).mul_(u.factor).to(u.A.dtype)  # (r, in)
    if u.B.requires_grad:
        hidden = linear.product(z, u.a)  # (tokens, r)
        grad_B = linear.product(hidden.T, grad.T).T.mul(u.factor).to(u.B.dtype)  # (out, r)
    return grad_A, grad_B


@dataclass(frozen=True)
class Slice(Group):
    """The same of some rows of x. A drop(x), of the ranks' width, is kept for backward.

    Products are PyTorch's own: oneDNN compiles one for each number of rows, and keeps fewer (heap.py) than several runs
    have in a layer.
    """

    @property
    def rows(self) -> slice:
        rows = self.members[0].update.rows
        assert rows is not None
        return rows

    @property
    def stacked(self) -> Tensor:
        """(Σr, in): the A's of all members."""
        parts = [one.update.a for one in self.members]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def parts(self, x: Tensor) -> Sequence[Tensor]:
        """Each member's part of a tensor with Σr columns."""
        return x.split([one.update.rank for one in self.members], 1)

    def add(self, h: Tensor, ys: Sequence[Tensor]) -> None:
        with read(h[self.rows], self.dropped) as z:
            hidden = z @ self.stacked.T  # (rows, Σr)
        for one, own in zip(self.members, self.parts(hidden), strict=True):
            u = one.update
            u.hidden[:] = [own]
            ys[one.site][self.rows].addmm_(own, u.b.T, alpha=u.factor)

    def back(self, grads: Sequence[Tensor], h: Tensor, grad_h: Tensor | None, found: list[Tensor | None]) -> None:
        given = [grads[one.site][self.rows] for one in self.members]  # (rows, out) each
        pairs = list(zip(self.members, given, strict=True))
        scaled = [times(one.update.factor, g, one.update.b) for one, g in pairs]  # s·g B, (rows, r) each
        ranks = scaled[0] if len(scaled) == 1 else torch.cat(scaled, 1)  # (rows, Σr)
        if any(one.update.A.requires_grad for one in self.members):
            with read(h[self.rows], self.dropped) as z:
                of_A = (ranks.T @ z).split([one.update.rank for one in self.members])  # (r, in) each
            for one, grad_A in zip(self.members, of_A, strict=True):
                found[one.place] = grad_A.to(one.update.A.dtype) if one.update.A.requires_grad else None
        for one, g in pairs:
            u = one.update
            if u.B.requires_grad:
                found[one.place + 1] = times(u.factor, u.hidden[0].T, g).T.to(u.B.dtype)  # (out, r)
        if grad_h is not None:
            mine = grad_h[self.rows]
            with outside(mine, self.dropped):
                mine.addmm_(ranks, self.stacked)


def times(factor: float, x: Tensor, y: Tensor) -> Tensor:
    """factor·x y, by one kernel."""
    return torch.addmm(x.new_empty(1), x, y, beta=0, alpha=factor)


def groups(h: Tensor, updates: Sequence[Sequence[Update]]) -> list[Group]:
    """The updates of each site, gathered by what they read of h, so that each mask is drawn once."""
    found: dict[tuple[int, float, int], list[Member]] = {}
    place = 0
    for number, of_site in enumerate(updates):
        for u in of_site:
            key = (u.rows.start if u.rows else 0, u.p, u.seed)
            found.setdefault(key, []).append(Member(u, number, place))
            place += 2
    return [group(h, members) for members in found.values()]


def group(h: Tensor, members: list[Member]) -> Group:
    first = members[0].update
    if first.rows is None:
        return Group(members, mask(h, first.p, first.seed) if first.p else None)
    return Slice(members, mask(h[first.rows], first.p, first.seed) if first.p else None)


def read(h: Tensor, dropped: Mask | None) -> AbstractContextManager[Tensor]:
    return nullcontext(h) if dropped is None else dropped.zeroed(h)


def outside(grad: Tensor, dropped: Mask | None) -> AbstractContextManager[None]:
    return nullcontext() if dropped is None else dropped.outside(grad)
