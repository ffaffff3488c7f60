"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (arXiv 2303.10512)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank.adapters.base import Adapter, shape
from lowrank.adapters.methods.budget import RankAllocator, Schedule, Triplets
from lowrank.adapters.methods.dropout import mask_of
from lowrank.adapters.methods.options import (
    fraction,
    not_negative,
    positive_integer,
    positive_number,
    probability,
    smoothing,
)
from lowrank.adapters.methods.update import LowRankUpdate, owns


class AdaLoRA(Adapter):
    """h = W x + s·B diag(E) A x, an SVD in form: A (r, in) and B (out, r) from N(0, 0.02²), E (r,) zero, r = init_r.

    s = alpha / init_r, whatever the ranks become. ``penalty`` keeps A's rows and B's columns near orthonormal: it is
    orth_weight · (‖BᵀB − I‖² + ‖AAᵀ − I‖²), squared Frobenius norms (section 3.1), which the loop adds up over sites.
    (The authors' code and PEFT take the mean over all factors of the norms, not squared: a weight of 0.5 there pulls
    like one between 1e-4 and 1e-3 here, on a model of a few hundred sites.)

    The budget, of all sites of a rule together, falls from init_r to target_r a site; the first ``tinit`` of the run
    comes before that and its last ``tfinal`` after it (both as fractions). ``budget.RankAllocator``, which the loop
    calls, gives it out anew every ``delta_t`` steps (None: at most twenty times in all). In the end exactly target_r
    times the number of sites are left.

    Raises ValueError for an option out of its range; ``hook``, ConfigError for a ``delta_t`` too long for the run.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        generator: torch.Generator,
        init_r: int = 12,
        target_r: int = 8,
        alpha: float = 32.0,
        dropout: float = 0.0,
        tinit: float = 0.1,
        tfinal: float = 0.3,
        delta_t: int | None = None,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orth_weight: float = 0.001,
    ) -> None:
        super().__init__()
        self.init_r, self.target_r = positive_integer("init_r", init_r), positive_integer("target_r", target_r)
        if target_r > init_r:
            raise ValueError(f"target_r: {target_r} is not allowed; at most init_r, which is {init_r}.")
        self.scale, self.dropout = positive_number("alpha", alpha) / init_r, probability("dropout", dropout)
        self.tinit, self.tfinal = fraction("tinit", tinit), fraction("tfinal", tfinal)
        if tinit + tfinal >= 1:
            raise ValueError(f"tfinal: {tfinal} is not allowed; with tinit {tinit}, less than {1 - tinit:g}.")
        self.delta_t = None if delta_t is None else positive_integer("delta_t", delta_t)
        self.beta1, self.beta2 = smoothing("beta1", beta1), smoothing("beta2", beta2)
        self.orth_weight = not_negative("orth_weight", orth_weight)
        out_features, in_features = shape(base)
        self.A = nn.Parameter(torch.empty(init_r, in_features).normal_(0, 0.02, generator=generator))
        self.E = nn.Parameter(torch.zeros(init_r))
        self.B = nn.Parameter(torch.empty(out_features, init_r).normal_(0, 0.02, generator=generator))

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        y = base(x)  # (…, out)
        EA = self.E[:, None] * self.A  # (r, in)
        return LowRankUpdate.apply(y, x, EA, self.B, self.scale, *mask_of(self), owns(base) and y.is_contiguous())

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.E[:, None] * self.A, self.scale * self.B  # (r, in), (out, r)

    def penalty(self) -> Tensor | float:
        if not self.orth_weight:
            return 0.0
        return self.orth_weight * (FromOrthonormal.apply(self.A) + FromOrthonormal.apply(self.B.T))

    @classmethod
    def hook(cls, adapters: dict[str, Adapter], *, steps: int) -> RankAllocator:
        one = cast(AdaLoRA, next(iter(adapters.values())))  # all of them have the same options
        sites, parts = len(adapters), (one.tinit, one.tfinal)
        schedule = Schedule.of(steps, parts, one.delta_t, start=one.init_r * sites, end=one.target_r * sites)
        return RankAllocator(cast(dict[str, Triplets], adapters), schedule, one.beta1, one.beta2)

    def extra_repr(self) -> str:
        return f"init_r={self.init_r}, target_r={self.target_r}, scale={self.scale:g}, dropout={self.dropout:g}"


class FromOrthonormal(torch.autograd.Function):
    """‖M Mᵀ − I‖² of M (r, width), and its gradient 4·(M Mᵀ − I) M: autograd would make the second product twice."""

    @staticmethod
    def forward(ctx: Any, M: Tensor) -> Tensor:
        with torch.autocast(M.device.type, enabled=False):
            off = M @ M.T  # (r, r)
        off.diagonal().sub_(1)
        ctx.save_for_backward(M, off)
        return off.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        M, off = ctx.saved_tensors
        with torch.autocast(M.device.type, enabled=False):
            return (off * (4 * grad)) @ M
