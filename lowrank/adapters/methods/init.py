"""Where LoRA's A (r, in) and B (out, r) start, by name.

Four are drawn and leave the base alone, since B A = 0. Three are read off the weight W (out, in): they take
s·B0 A0 out of it, so that base and adapter together start (near) where the base was. All are fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank.adapters.base import dense_weight, shape
from lowrank.quant.nf4 import NF4Linear

Factors = tuple[Tensor, Tensor]  # A (r, in), B (out, r)

LOFTQ_STEPS = 5


@dataclass(frozen=True)
class Start:
    A: Tensor
    B: Tensor
    taken: Factors | None = None  # A0, B0: the base gives up s·B0 A0
    identity: bool | Literal["rounding"] = True  # whether the start computes what the base did


@torch.no_grad()
def start(init: str, base: nn.Module, r: int, scale: float, generator: torch.Generator) -> Start:
    """Raises ValueError where the layer, or its rank, does not allow ``init``."""
    out, into = shape(base)
    if init in DRAWN:
        return Start(*DRAWN[init](out, into, r, generator), identity="rounding" if init == "orthogonal" else True)
    if r > min(out, into):
        most = f"at most {min(out, into)} on a layer of {out}×{into}"
        raise ValueError(f"r: {r} is not allowed with init={init}; {most}.")
    weight = dense_weight(base)
    if init == "loftq":
        refuse_loftq(base)
        factors, taken = loftq(weight, r, scale)
        return Start(*factors, taken, identity=False)
    A, B = pissa(weight, r, scale) if init == "pissa" else olora(weight, r)
    return Start(A, B, (A.clone(), B.clone()), identity=False if isinstance(base, NF4Linear) else "rounding")


def default(out: int, into: int, r: int, generator: torch.Generator) -> Factors:
    """A uniform within 1/√in, as ``nn.Linear`` draws its own weight; B = 0 (arXiv 2106.09685)."""
    bound = 1 / math.sqrt(into)
    return torch.empty(r, into).uniform_(-bound, bound, generator=generator), torch.zeros(out, r)


def gaussian(out: int, into: int, r: int, generator: torch.Generator) -> Factors:
    """A normal with standard deviation 1/r, B = 0 (arXiv 2106.09685, section 4.1; the deviation is PEFT's)."""
    return normal(r, into, generator) / r, torch.zeros(out, r)


def zeros(out: int, into: int, r: int, generator: torch.Generator) -> Factors:
    """The other way round: A = 0 and B normal with variance 1/r ("Init[B]" of arXiv 2406.08447). With both zero
    neither would have a gradient."""
    return torch.zeros(r, into), normal(out, r, generator) / math.sqrt(r)


def orthogonal(out: int, into: int, r: int, generator: torch.Generator) -> Factors:
    """Neither is zero, and yet B A = 0 up to rounding: A = Q₁ᵀ N₁ / 10 and B = N₂ Q₂ / 10 with N normal and Q₁, Q₂
    (r/2, r) the halves of one random orthogonal matrix, so that Q₂ Q₁ᵀ = 0. What PEFT calls orthogonal."""
    if r % 2:
        raise ValueError(f"r: {r} is not allowed with init=orthogonal; an even number.")
    Q = torch.linalg.qr(normal(r, r, generator)).Q
    one, other = Q.chunk(2)  # (r/2, r) each
    return one.T @ normal(r // 2, into, generator) / 10, normal(out, r // 2, generator) @ other / 10


def normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.empty(rows, columns).normal_(generator=generator)


def pissa(weight: Tensor, r: int, scale: float) -> Factors:
    """The r largest parts of W = U S Vᵀ, each factor with the root of S: s·B A = U_r S_r V_rᵀ (arXiv 2404.02948)."""
    U, S, Vh = torch.linalg.svd(wide(weight), full_matrices=False)
    root = (S[:r] / scale).sqrt()  # (r,)
    return kept(root[:, None] * Vh[:r]), kept(U[:, :r] * root)


def olora(weight: Tensor, r: int) -> Factors:
    """The first r columns of Q and rows of R of W = Q R; s·B A is taken out of W (arXiv 2406.01775)."""
    Q, R = torch.linalg.qr(wide(weight))
    return kept(R[:r]), kept(Q[:, :r])


def loftq(weight: Tensor, r: int, scale: float) -> tuple[Factors, Factors]:
    """A, B with NF4(W − s·B0 A0) + s·B A near W, and A0, B0 (arXiv 2310.08659, algorithm 1).

    In turns the rest of W is quantised, Q = NF4(W − s·B A), and s·B A becomes the best rank-r part of W − Q; A0 and
    B0 are those of the last Q. One turn (A0 = B0 = 0) would give QLoRA's base with the best adapter for its error.
    """
    A = weight.new_zeros(r, weight.shape[1], dtype=torch.float32)
    B = weight.new_zeros(weight.shape[0], r, dtype=torch.float32)
    A0, B0 = A, B
    for _ in range(LOFTQ_STEPS):
        A0, B0 = A, B
        held = NF4Linear.from_dense(residual(weight, A0, B0, scale), None, double=True).dequantize()  # (out, in)
        A, B = pissa(weight - held, r, scale)
    return (A, B), (A0, B0)


def refuse_loftq(base: nn.Module) -> None:
    if isinstance(base, NF4Linear):
        raise ValueError("init: loftq quantises the layer itself, and here it is quantised already; quant=none.")
    if type(base) not in (nn.Linear, Conv1D):
        raise ValueError(f"init: loftq quantises nn.Linear and Conv1D layers; this is {type(base).__name__}.")


def residual(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W − s·B A (out, in), in fp32 or wider."""
    W = wide(weight)
    return torch.addmm(W, B.to(W), A.to(W), alpha=-scale)


def wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def kept(factor: Tensor) -> Tensor:
    """Contiguous, as a saved factor comes back: products with it are then the same bit for bit."""
    return factor.to(torch.float32).contiguous().clone()


DRAWN = {"default": default, "gaussian": gaussian, "orthogonal": orthogonal, "zeros": zeros}
INITS = (*DRAWN, "pissa", "olora", "loftq")
