"""Changes ΔW = B A of a weight: put together, cut to a rank, measured; in the dtype they come in (fp64)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]  # A (r, in), B (out, r), scale included


def ties(changes: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Trim, elect a sign, and the mean of those that have it (arXiv 2306.01708, algorithm 1, a site at a time)."""
    weighted = torch.stack([w * largest(change, density) for w, change in zip(weights, changes, strict=True)])
    elected = weighted.sum(0).sign()  # (out, in)
    agree = (weighted.sign() == elected) & (weighted != 0)
    return (weighted * agree).sum(0) / agree.sum(0).clamp_min(1)


def largest(change: Tensor, density: float) -> Tensor:
    """``change`` with the entries largest in size, ``density`` of them, and zero elsewhere."""
    kept = max(1, round(density * change.numel()))
    flat = change.flatten()
    at = flat.abs().topk(kept).indices
    return torch.zeros_like(flat).index_copy_(0, at, flat[at]).view_as(change)


def dare(
    changes: Sequence[Tensor], weights: Sequence[float], density: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """Σ wᵢ mᵢ∘ΔWᵢ / density, each mᵢ a draw of its own (arXiv 2311.03099; its p is 1 − density)."""
    result = torch.zeros_like(changes[0])
    for w, change, generator in zip(weights, changes, generators, strict=True):
        mask = torch.rand(change.shape, generator=generator) < density
        result += w / density * change * mask
    return result


def cut(A: Tensor, B: Tensor, rank: int) -> Factors:
    """The best B' A' of a rank (Eckart and Young), from the factors alone: nothing of (out, in) is built."""
    Qb, Rb = torch.linalg.qr(B)  # (out, n), (n, r)
    Qa, Ra = torch.linalg.qr(A.T)  # (in, m), (m, r)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T)  # of (n, m)
    root = S[:rank].sqrt()
    return (Qa @ Vh[:rank].T * root).T, Qb @ U[:, :rank] * root


def truncated(matrix: Tensor, rank: int) -> Factors:
    """The best B A of a rank, by the eigenvectors of the smaller Gram matrix: for one that is dense."""
    if matrix.shape[0] > matrix.shape[1]:
        A, B = truncated(matrix.T, rank)
        return B.T, A.T
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)  # ascending, (out, out)
    U, squares = vectors.flip(1)[:, :rank], values.flip(0)[:rank].clamp_min(0)
    root = squares.sqrt().sqrt()  # (rank,)
    inverse = torch.where(root > 1e-8 * root[0], 1 / root, 0.0)
    return inverse[:, None] * (U.T @ matrix), U * root


def norm(A: Tensor, B: Tensor) -> float:
    """‖B A‖, without building it."""
    return float((torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T).norm())


def difference(one: Factors, other: Factors) -> Factors:
    """The factors of B A − B' A'."""
    return torch.cat([one[0].double(), other[0]]), torch.cat([one[1].double(), -other[1]], dim=1)


def relative(distance: float, size: float, parts: float) -> float:
    """‖Δ‖ / ‖W‖, of a sum W of ``parts`` in size; ‖Δ‖ / parts where W is nothing but their rounding."""
    of = size if size > 1e-12 * parts else parts
    return distance / of if of > 0 else distance
