"""What adapters have added to the weights: ΔW = W' − W of each site by its singular values.

Where a method has factors, ΔW = B A, they are enough: B = Q₁R₁ and Aᵀ = Q₂R₂ leave the singular values in the
(r, r) matrix R₁R₂ᵀ, and no matrix of the weight's size is made. For any other mergeable method ΔW is
``merged(W, b) − W``, and its singular values are the roots of the eigenvalues of its smaller Gram matrix. All in
fp64. W is the weight before the adapter came: where the start took s·B₀A₀ out of it (PiSSA), ΔW = s(B A − B₀A₀).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lowrank.adapters.bank import Bank
from lowrank.adapters.base import LINEAR, Adapted, Adapter, NotMergeable, dense_weight

TINY = 1e-6  # singular values below this share of the largest are noise: of fp32 factors, of a Gram matrix's roots
LOST = 1e-14  # … and those below this share of ‖B‖‖A‖, or of ‖W‖, of the subtraction

Parts = tuple[Tensor, Tensor, Tensor]  # U (out, k), σ (k,) from the largest, V (in, k): ΔW = U diag(σ) Vᵀ


@dataclass(frozen=True)
class Update:
    """ΔW (out, in) of one site, as its two factors where the method has them."""

    path: str
    method: str
    shape: tuple[int, int]
    weight: float  # ‖W‖
    factors: tuple[Tensor, Tensor] | None  # A (r, in), B (out, r)
    matrix: Tensor | None  # ΔW (out, in), where there are none
    changed_base: bool  # W was not kept: this is relative to what the adapter's start made of it

    @property
    def work(self) -> float:
        """About the multiplications that its singular values take."""
        out, into = self.shape
        return (out + into) * len(self.factors[0]) ** 2 if self.factors else out * into * min(out, into)

    @cached_property
    def norm(self) -> float:
        """‖ΔW‖, Frobenius."""
        return float(self.parts[1].norm() if self.matrix is None else self.matrix.norm())

    @cached_property
    def parts(self) -> Parts:
        """Without what is noise; k is 0 where nothing has changed."""
        if self.matrix is not None:
            return of_matrix(self.matrix, LOST * self.weight)
        assert self.factors is not None
        return of_factors(*self.factors)


@dataclass(frozen=True)
class Spectrum:
    """What one site's adapter has done to its weight, in numbers."""

    path: str
    method: str
    shape: tuple[int, int]
    change: float  # ‖ΔW‖ / ‖W‖
    singular: tuple[float, ...] | None  # of ΔW from the largest, without what is noise; None: not computed
    effective_rank: float | None
    stable_rank: float | None
    changed_base: bool


@dataclass(frozen=True)
class Overlap:
    """φ(i, j) between the first i singular vectors of one ΔW and the first j of another's: of their left vectors
    (out, i), and of their right ones (in, j)."""

    path: str
    shape: tuple[int, int]
    first: tuple[int, ...]  # i: 1, 2, 4, … and the rank
    second: tuple[int, ...]  # j
    left: tuple[tuple[float, ...], ...]  # a row for each i
    right: tuple[tuple[float, ...], ...]


def spectrum(found: Update, most: float = math.inf) -> Spectrum:
    """The numbers of one site; without singular values where those would take more than ``most`` multiplications."""
    S = found.parts[1] if found.work <= most else None
    return Spectrum(
        found.path,
        found.method,
        found.shape,
        change=found.norm / max(found.weight, 1e-30),
        singular=None if S is None else tuple(S.tolist()),
        effective_rank=None if S is None else effective_rank(S),
        stable_rank=None if S is None else stable_rank(S),
        changed_base=found.changed_base,
    )


def overlap(one: Update, other: Update) -> Overlap | None:
    """None where one of the two has changed nothing."""
    (U1, S1, V1), (U2, S2, V2) = one.parts, other.parts
    if not len(S1) or not len(S2):
        return None
    i, j = counts(len(S1)), counts(len(S2))
    left, right = (overlaps(a, b)[[n - 1 for n in i]][:, [n - 1 for n in j]] for a, b in ((U1, U2), (V1, V2)))
    return Overlap(one.path, one.shape, i, j, *(tuple(map(tuple, grid.tolist())) for grid in (left, right)))


def counts(rank: int) -> tuple[int, ...]:
    """1, 2, 4, … and the rank itself."""
    return (*(2**n for n in range(rank.bit_length()) if 2**n < rank), rank)


@torch.no_grad()
def update(path: str, module: Adapted) -> Update | None:
    """ΔW of a wrapped site; None where the method is no change of a weight, or no adapter is in use there."""
    adapter = in_use(module)
    if adapter is None or not isinstance(module.base, (*LINEAR, nn.Embedding)):
        return None
    now, taken = dense_weight(module.base), taken_out(adapter)  # (out, in)
    before = now
    if module.original is not None and module.original is not module.base:
        before = dense_weight(module.original)
    elif taken is not None:
        before = torch.addmm(now.float(), taken[1].float(), taken[0].float())
    size = float(torch.linalg.vector_norm(before, dtype=torch.float64))
    changed_base = module.original is None and taken is None
    factors = factors_of(adapter, taken) if before is now or taken is not None else None
    matrix = None
    if factors is None or len(factors[0]) >= min(now.shape):
        factors, matrix = None, difference(module.base, adapter, now, before)
        if matrix is None:
            return None
    shape = (now.shape[0], now.shape[1])
    return Update(path, type(adapter).__name__, shape, size, factors, matrix, changed_base)


def factors_of(adapter: Adapter, taken: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """A (r, in), B (out, r) of all that has changed since before the start; None where the method has no factors."""
    found = adapter.factors()
    if found is None:
        return None
    A, B = (factor.detach().double() for factor in found)
    return (A, B) if taken is None else (torch.cat([A, taken[0]]), torch.cat([B, -taken[1]], dim=1))


def difference(base: nn.Module, adapter: Adapter, now: Tensor, before: Tensor) -> Tensor | None:
    """W' − W (out, in) by the method's own merge; None where it has none."""
    bias = getattr(base, "bias", None)
    try:
        after, _ = adapter.merged(now.double(), None if bias is None else bias.double())
    except NotMergeable:
        return None
    return after.detach() - before.detach().double()


def in_use(module: Adapted) -> Adapter | None:
    """Of several adapters the one that calls go through; None where they go to the bare base."""
    if module.bypassed:
        return None
    return module.adapter.chosen() if isinstance(module.adapter, Bank) else module.adapter


def taken_out(adapter: Adapter) -> tuple[Tensor, Tensor] | None:
    """What the start took out of the base: A₀ (r, in) and s·B₀ (out, r)."""
    A0, B0 = getattr(adapter, "A0", None), getattr(adapter, "B0", None)
    if A0 is None or B0 is None:
        return None
    return A0.double(), (getattr(adapter, "scale", 1.0) * B0).double()  # as rounded as ``factors`` has it


def of_factors(A: Tensor, B: Tensor) -> Parts:
    """The singular value decomposition of B A, (out, r) (r, in)."""
    (Q1, R1), (Q2, R2) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vt = torch.linalg.svd(R1 @ R2.T)
    k = above_noise(S, LOST * float(A.norm() * B.norm()))
    return Q1 @ U[:, :k], S[:k], Q2 @ Vt[:k].T


def of_matrix(matrix: Tensor, lost: float) -> Parts:
    """The singular value decomposition of any (out, in)."""
    wide = matrix.shape[0] <= matrix.shape[1]
    M = matrix if wide else matrix.T
    squares, vectors = torch.linalg.eigh(M @ M.T)  # ascending
    S = squares.clamp_min(0).sqrt().flip(0)
    k = above_noise(S, lost)
    one = vectors.flip(1)[:, :k]
    other = M.T @ one / S[:k]
    return (one, S[:k], other) if wide else (other, S[:k], one)


def above_noise(S: Tensor, lost: float) -> int:
    return int((max(TINY * float(S[0]), lost) < S).sum()) if len(S) else 0


def effective_rank(S: Tensor) -> float:
    """exp(−Σ p ln p) with p = σ / Σσ: how many directions the change is spread over (Roy & Vetterli 2007, "The
    effective rank: a measure of effective dimensionality"). 0 where nothing has changed."""
    p = S / S.sum()
    return float(torch.special.entr(p).sum().exp()) if len(S) else 0.0


def stable_rank(S: Tensor) -> float:
    """‖ΔW‖² / σ₁², Frobenius: at most the rank, and little moved by small singular values. 0 for no change."""
    return float((S / S[0]).square().sum()) if len(S) else 0.0


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """φ(i, j) = ‖U₁ⁱᵀ U₂ʲ‖² / min(i, j), (k, l), of the first i and j orthonormal columns of two matrices (n, k) and
    (n, l): 1 where one subspace holds the other, 0 where they are orthogonal, max(i, j)/n by chance (LoRA, arXiv
    2106.09685, section 7.2, equation 4)."""
    shared = (first.T @ second).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, size + 1, device=shared.device) for size in shared.shape)
    return shared / torch.minimum(i[:, None], j[None, :])
