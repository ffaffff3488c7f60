"""Which of NF4's 16 levels each weight takes, so that the layer's output is kept rather than its weights.

Rounding each weight to its nearest level loses a small change ΔW altogether: W stands on levels already, and a change
of half a per cent reaches the middle between two levels at almost no weight. What a layer's output sees of the error
E = Q − T, with T (out, in) the weight wanted and Q its rounding, is

    ‖E Xᵀ‖² = tr(E H Eᵀ),  H = Xᵀ X,  X (tokens, in) what the layer is given,

and in that measure the error of one weight can be made good by the weights beside it: a few codes flip, and together
they carry the change. Finding the best codes is a closest vector problem, one for each row; it is approached twice:

- ``feedback``: column after column, each rounding's error carried over to the columns still to come. This is GPTQ
  (arXiv 2210.17323), written as Babai's nearest plane over H = L Lᵀ (arXiv 2507.18553: they are the same).
- ``descended``: coordinate descent from there; each weight in turn takes the level that is best given all others.

The scales are kept as they are: W itself stands on their levels exactly, and only ΔW has to be carried.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.quant.nf4 import nf4_levels

COLUMNS = 64  # worked on at a time, so that most of the work is matrix products
DAMPING = 1e-3  # of H's mean diagonal, added to it
PASSES = 2  # of coordinate descent; two more change the share that survives on SmolLM2 by 0.005


def rounded(target: Tensor, scales: Tensor, moment: Tensor, start: Tensor, passes: int = PASSES) -> Tensor:
    """Codes (out, in) uint8 in 0 … 15 whose weights, level · scale, keep the output of ``target``; nearly the best.

    ``target`` and ``scales``, each weight's own, are (out, in); ``moment`` H is (in, in). ``start`` are the codes
    from before: a row that they serve better keeps them, so the error is never larger than with them. fp32.
    """
    moment = damped(moment.float())
    target, scales = target.float(), scales.float()
    found = descended(target, scales, moment, feedback(target, scales, moment), passes)
    new, old = (output_error(weights(codes, scales) - target, moment) for codes in (found, start))  # (out,)
    return torch.where((new >= old)[:, None], start, found)


def weights(codes: Tensor, scales: Tensor) -> Tensor:
    """What codes stand for, (out, in) fp32: to the bit what ``NF4Linear.dequantize`` gives."""
    return nf4_levels(codes.device)[codes.long()] * scales


def nearest(wanted: Tensor, scales: Tensor) -> Tensor:
    """The code of the nearest level of each weight, uint8; of a block whose scale is 0 any code is 0."""
    levels = nf4_levels(wanted.device).to(wanted.dtype)
    middles = (levels[1:] + levels[:-1]) / 2  # (15,)
    return torch.bucketize(wanted / torch.where(scales == 0, 1, scales), middles).to(torch.uint8)


def damped(moment: Tensor) -> Tensor:
    """H + λ I: inputs that calibration has hardly seen, or not at all (H singular), count a little too."""
    mean = moment.diagonal().mean()
    return moment + torch.eye(len(moment), device=moment.device) * (DAMPING * mean if mean > 0 else 1.0)


def cholesky(moment: Tensor) -> Tensor:
    """L (in, in), lower, with L Lᵀ = H; in fp64 where rounding leaves fp32's H without one."""
    factor, failed = torch.linalg.cholesky_ex(moment)
    return torch.linalg.cholesky(moment.double()).to(moment.dtype) if failed else factor


def output_error(error: Tensor, moment: Tensor) -> Tensor:
    """(out,) e H eᵀ of each row e of ``error`` (out, in): the squares of what its output is off by, summed."""
    return ((error @ moment) * error).sum(1)


def feedback(target: Tensor, scales: Tensor, moment: Tensor) -> Tensor:
    """Codes by error feedback, the columns of the largest inputs first.

    With E = Q − T and H = L Lᵀ the error is Σⱼ (Σ_{i≥j} eᵢ Lᵢⱼ)²: from the last column on, each is rounded so that
    its own term is least given those behind it, which they shift by Σ_{i>j} eᵢ Lᵢⱼ / Lⱼⱼ.
    """
    order = moment.diagonal().argsort()
    target, scales = target[:, order], scales[:, order]
    L = cholesky(moment[order][:, order])
    error, codes = torch.zeros_like(target), torch.empty_like(target, dtype=torch.uint8)
    for first in reversed(range(0, len(L), COLUMNS)):
        last = min(first + COLUMNS, len(L))
        behind = error[:, last:] @ L[last:, first:last]  # (out, columns)
        for j in reversed(range(first, last)):
            shift = behind[:, j - first] + error[:, j + 1 : last] @ L[j + 1 : last, j]  # (out,)
            codes[:, j] = nearest(target[:, j] - shift / L[j, j], scales[:, j])
            error[:, j] = weights(codes[:, j], scales[:, j]) - target[:, j]
    return codes[:, order.argsort()]


def descended(target: Tensor, scales: Tensor, moment: Tensor, codes: Tensor, passes: int) -> Tensor:
    """Codes after ``passes`` rounds in which each column moves to its best levels, given all others.

    Along column j the error is least at Qⱼ − (E H)ⱼ / Hⱼⱼ, so the nearest level to that is the best one.
    """
    codes, held = codes.clone(), weights(codes, scales)
    for _ in range(passes):
        before = codes.clone()
        for first in range(0, len(moment), COLUMNS):
            last = min(first + COLUMNS, len(moment))
            gradient = (held - target) @ moment[:, first:last]  # (out, columns)
            for j in range(first, last):
                wanted = held[:, j] - gradient[:, j - first] / moment[j, j]
                codes[:, j] = nearest(wanted, scales[:, j])
                moved = weights(codes[:, j], scales[:, j]) - held[:, j]  # (out,)
                held[:, j] += moved
                gradient += moved[:, None] * moment[j, first:last]
        if torch.equal(codes, before):
            break
    return codes
