"""A LoRA's rank changed on a live model, its optimizer's state carried over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters.bank import Bank, Held, held, which
from lowrank.adapters.base import Adapter
from lowrank.adapters.methods.dora import DoRA
from lowrank.adapters.methods.init import default
from lowrank.adapters.methods.lora import LoRA
from lowrank.adapters.methods.options import positive_integer
from lowrank.adapters.rank import of_rank
from lowrank.adapters.sites import Pattern, matched, show, suggestion
from lowrank.errors import ConfigError
from lowrank.keys import key

# What optimizers keep for each entry of a parameter: means of its gradients, and of their squares.
MEANS = ("exp_avg", "momentum_buffer", "grad_avg")
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


@dataclass(frozen=True)
class ResizedSite:
    path: str
    before: int
    after: int
    error: float  # ‖ΔW' − ΔW‖ / ‖ΔW‖


@dataclass(frozen=True)
class Resized:
    """What was resized, and what that cost."""

    sites: tuple[ResizedSite, ...]

    def __str__(self) -> str:
        if not self.sites:
            return "every rank is as asked already"
        width = max(len(site.path) for site in self.sites)
        lines = [
            f"{site.path.ljust(width)}  rank {site.before:>4} → {site.after:>4}  error {site.error:.2e}"
            for site in self.sites
        ]
        worst = max(self.sites, key=lambda site: site.error)
        mean = sum(site.error for site in self.sites) / len(self.sites)
        return "\n".join([*lines, f"error ‖ΔW' − ΔW‖ / ‖ΔW‖: mean {mean:.2e}, worst {worst.error:.2e} ({worst.path})"])


@dataclass(frozen=True)
class Change:
    """New factors A' = P A and B' = B Q, and so how what an optimizer keeps of their gradients follows.

    With G the gradient of B A it is ∂A = Bᵀ G and ∂B = G Aᵀ, so ∂A' = Qᵀ ∂A and ∂B' = ∂B Pᵀ. Means of gradients follow
    exactly so; means of squares by the squares of P and Q, exact where the gradients of two directions do not
    correlate.
    """

    A: Tensor
    B: Tensor
    P: Tensor  # (r', r)
    Q: Tensor  # (r, r')
    error: float


@torch.no_grad()
def resize(
    model: nn.Module,
    r: int | Mapping[Any, int],
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
    name: str | None = None,
) -> Resized:
    """Gives every LoRA and DoRA of ``model`` the rank ``r``, or those that a pattern of ``{pattern: r}`` names, in
    place; ``name`` is of one of several adapters. Scales stay as they are, so alpha follows.

    To a higher rank new rows of A are drawn (keyed by ``seed`` and path) and new columns of B are zero: the output
    stays. To a lower one B A is cut by SVD, the least error there is, rather than by leaving directions out: turned
    into the singular directions, what the optimizer has of the gradients' means follows exactly.

    ``optimizer`` holds the same parameter objects afterwards, with new values; its state is carried over (steps as
    they are; for new directions no momentum, and the squares of the old directions on average, since a square of zero
    would make their first steps the largest of all). Between two steps: gradients are dropped.

    Raises ConfigError, with nothing changed, for a rank that is not allowed, a pattern that names no adapter, an
    adapter that is no LoRA or whose start changed the base, and state of an optimizer that is kept in another form.
    """
    found, name = held(model, name), which(model, name)
    if not found:
        raise ConfigError("resize: the model carries no adapter.")
    ranks = wanted(model, r, found)
    for path, rank in ranks.items():
        refuse(path, found[path].adapter, rank)
    adapters: dict[str, Any] = {path: found[path].adapter for path in ranks}
    changed = {path: adapter for path, adapter in adapters.items() if adapter.r != ranks[path]}
    for path, adapter in changed.items():
        check_state(f"{path}.adapter.A", adapter.A, optimizer)
        check_state(f"{path}.adapter.B", adapter.B, optimizer)
    sites = []
    for path, adapter in changed.items():
        before, rank = adapter.r, ranks[path]
        change = grown(path, adapter, rank, seed) if rank > before else shrunk(adapter, rank)
        put(found[path], name, change, optimizer)
        sites.append(ResizedSite(path, before, rank, change.error))
    return Resized(tuple(sites))


def wanted(model: nn.Module, r: int | Mapping[Pattern, int], found: Mapping[str, Held]) -> dict[str, int]:
    """The rank of each site that is named."""
    ranks: dict[str, int] = {}
    for pattern, rank in r.items() if isinstance(r, Mapping) else [("*", r)]:
        try:
            positive_integer("r", rank)
        except ValueError as error:
            raise ConfigError(f"resize: {error}") from error
        hits = [path for path in matched(model, pattern) if path in found]
        if not hits:
            raise ConfigError(f"resize: {show(pattern)} names no adapter.{suggestion(pattern, dict.fromkeys(found))}")
        twice = next((path for path in hits if ranks.get(path, rank) != rank), None)
        if twice is not None:
            raise ConfigError(f"resize: {twice} is given two ranks, {ranks[twice]} and {rank}.")
        ranks |= dict.fromkeys(hits, rank)
    return ranks


def refuse(path: str, adapter: Adapter, rank: int) -> None:
    if type(adapter) not in (LoRA, DoRA):
        raise ConfigError(
            f"resize: {path} carries {type(adapter).__name__}; the rank of LoRA and DoRA alone can change."
        )
    assert isinstance(adapter, LoRA)
    if adapter.A0 is not None:
        raise ConfigError(
            f"resize: {path}: its start (init={adapter.init}) took a part of rank {adapter.r} out of the base, which "
            f"its file names by that rank. Load it with a name, which puts it on the original base."
        )
    least = min(adapter.B.shape[0], adapter.A.shape[1])
    if least < rank < adapter.r:
        raise ConfigError(f"resize: {path}: r: {rank} is not allowed; a change of this layer has rank {least} at most.")


def check_state(name: str, parameter: nn.Parameter, optimizer: torch.optim.Optimizer | None) -> None:
    for what, value in optimizer.state.get(parameter, {}).items() if optimizer else ():
        same = isinstance(value, Tensor) and value.shape == parameter.shape and what in (*MEANS, *SQUARES)
        if isinstance(value, Tensor) and value.ndim and not same:
            raise ConfigError(
                f"resize: the optimizer's {what} of {name}, {tuple(value.shape)}, is not a mean of gradients or "
                f"squares entry by entry ({', '.join((*MEANS, *SQUARES))}), so it cannot follow. Begin a new optimizer."
            )


def grown(path: str, adapter: LoRA, r: int, seed: int) -> Change:
    (out, into), more = (adapter.B.shape[0], adapter.A.shape[1]), r - adapter.r
    A, B = (t.to(adapter.A) for t in default(out, into, more, key(seed, "grow", path, adapter.r)))
    eye = torch.eye(adapter.r, dtype=adapter.A.dtype, device=adapter.A.device)
    P = torch.cat([eye, eye.new_zeros(more, adapter.r)])  # of the gradients' means: none for new directions
    return Change(torch.cat([adapter.A, A]), torch.cat([adapter.B, B], dim=1), P, P.T, 0.0)


def shrunk(adapter: LoRA, r: int) -> Change:
    """B A = (Qb Rb)(Qa Ra)ᵀ, and Rb Raᵀ = U S Vᵀ, cut to r: A' = c·Vᵀ Qaᵀ and B' = B Raᵀ V / c.

    c is A's mean row norm: A' is of A's size, as the balance of learning rates in A and B was. Where B A is zero the
    first r directions stay.
    """
    A, B = adapter.A.double(), adapter.B.double()
    (Qa, Ra), Rb = torch.linalg.qr(A.T), torch.linalg.qr(B).R  # (in, m), (m, old r); (n, old r)
    _, S, Vh = torch.linalg.svd(Rb @ Ra.T)  # of (n, m)
    if not S[0] > 0:
        P = torch.eye(adapter.r, dtype=A.dtype, device=A.device)[:r]
        return Change(adapter.A[:r].clone(), adapter.B[:, :r].clone(), P.to(adapter.A), P.T.to(adapter.A), 0.0)
    c = A.norm() / adapter.r**0.5
    P = c * Vh[:r] @ torch.linalg.pinv(Ra.T)  # A' = P A
    Q = Ra.T @ Vh[:r].T / c  # B' = B Q
    new_A, new_B, P, Q = (t.to(adapter.A) for t in (c * Vh[:r] @ Qa.T, B @ Q, P, Q))
    return Change(new_A, new_B, P, Q, float(S[r:].norm() / S.norm()))


def put(found: Held, name: str | None, change: Change, optimizer: torch.optim.Optimizer | None) -> None:
    """Sets the new values in the parameters that are there, so that whatever holds these goes on holding them."""
    adapter: Any = found.adapter
    r = len(change.A)
    moved = {adapter.A: (change.A, change.Q.T, None), adapter.B: (change.B, None, change.P.T)}
    for parameter, (value, left, right) in moved.items():
        state = optimizer.state.get(parameter, {}) if optimizer else {}
        for what, kept in state.items():
            if isinstance(kept, Tensor) and kept.ndim:
                state[what] = carried(what, kept, left, right)
        parameter.grad = None
        parameter.data = value.contiguous()
    options = of_rank({n: v for n, v in found.options.items() if n != "init"}, adapter.scale, r)
    adapter.r = r
    if name is None:
        found.site.options = options
    else:
        assert isinstance(found.site.adapter, Bank)
        found.site.adapter.options[name] = options


def carried(what: str, kept: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """left · kept, or kept · right, with the squares of left and right where squares are kept."""
    if what in MEANS:
        return kept_by(kept, left, right)
    moved = kept_by(kept, *(None if matrix is None else matrix.square() for matrix in (left, right)))
    if left is not None and len(left) > len(kept):
        moved[len(kept) :] = kept.mean(0)
    if right is not None and right.shape[1] > kept.shape[1]:
        moved[:, kept.shape[1] :] = kept.mean(1, keepdim=True)
    return moved


def kept_by(kept: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    moved = kept if left is None else left.to(kept) @ kept
    return (moved if right is None else moved @ right.to(kept)).contiguous()
