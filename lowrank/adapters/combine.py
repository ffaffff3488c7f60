"""One LoRA made of several, as folders, and how far it is from what was asked for.

With ΔWᵢ = sᵢ·Bᵢ Aᵢ of folder i and its weight wᵢ:

    sum    Σ wᵢ ΔWᵢ, exact: the ranks stand beside one another (task arithmetic, arXiv 2212.04089; a negative weight
           takes away)
    ties   of each ΔWᵢ the entries largest in size, ``density`` of them; at each entry the sign of their weighted
           sum; the mean of those wᵢ ΔWᵢ that have that sign (arXiv 2306.01708; equal weights are its λ)
    dare   of each ΔWᵢ a share ``density`` drawn at random, divided by it; then the sum (arXiv 2311.03099)

``ties`` and ``dare`` are no longer of low rank, so they are cut by SVD, as a sum is where a rank is given. Everything
is computed in fp64, site by site, and stored in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.adapters.algebra import Factors, cut, dare, difference, norm, relative, ties, truncated
from lowrank.adapters.methods.lora import LoRA
from lowrank.adapters.methods.options import positive_integer
from lowrank.adapters.plan import InjectionPlan, Row, dotted
from lowrank.adapters.rank import of_rank, on_original_base, on_paper, scale_of
from lowrank.adapters.store import PLAN, read_about, read_plan, read_tensors, write
from lowrank.errors import ConfigError, RefusedError, did_you_mean
from lowrank.keys import key

METHODS = ("sum", "ties", "dare")
LARGEST = 2**31  # values of a matrix


@dataclass(frozen=True)
class CombinedSite:
    path: str
    rank: int
    error: float  # ‖stored − wanted‖ / ‖wanted‖, Frobenius


@dataclass(frozen=True)
class Combined:
    """What a combination wrote."""

    folder: Path
    method: str
    sources: int
    sites: tuple[CombinedSite, ...]

    @property
    def mean_error(self) -> float:
        return sum(site.error for site in self.sites) / len(self.sites)

    @property
    def worst(self) -> CombinedSite:
        return max(self.sites, key=lambda site: site.error)

    def __str__(self) -> str:
        width = max(len(site.path) for site in self.sites)
        lines = [f"{site.path.ljust(width)}  rank {site.rank:>4}  error {site.error:.2e}" for site in self.sites]
        return "\n".join(
            [
                *lines,
                f"{self.method} of {self.sources} adapters on {len(self.sites)} sites",
                f"error ‖ΔW stored − ΔW‖ / ‖ΔW‖: mean {self.mean_error:.2e}, "
                f"worst {self.worst.error:.2e} ({self.worst.path})",
                str(self.folder),
            ]
        )


@dataclass(frozen=True)
class Source:
    """An adapter's folder, read."""

    folder: Path
    plan: InjectionPlan
    rows: Mapping[str, Row]
    tensors: Mapping[str, Tensor]
    base: Any  # what its base was, where the folder says it

    def factors(self, path: str) -> Factors:
        A, B = (self.tensors[f"{path}.adapter.{name}"].double() for name in ("A", "B"))
        return A, scale_of(self.rows[path]) * B


def combine(
    folders: Sequence[str | Path],
    weights: Sequence[float],
    folder: str | Path,
    *,
    method: str = "sum",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> Combined:
    """Writes the combination of the adapters in ``folders`` to ``folder``, a new one, as ``load_adapter`` reads it.

    Sites are those of any of them; where one lacks a site it adds nothing there. Without ``rank`` a sum is exact, and
    ties and dare keep as many ranks as their sources have together. ``density`` is of ties and dare, ``seed`` of dare.

    Raises ConfigError for a setting that is not allowed or a folder that is not empty, RefusedError for adapters that
    are not plain LoRA, not of one base, damaged or not finite; nothing is written then.
    """
    target = Path(folder)
    check(folders, weights, method, rank, density)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: not an empty folder. Name one that is empty or not there yet.")
    sources = [source(Path(name)) for name in folders]
    refuse_unlike(sources)
    if method != "sum":
        refuse_large(sources)
    paths = dict.fromkeys(path for one in sources for path in one.rows)
    rows, sites, tensors = [], [], dict[str, Tensor]()
    for path in paths:
        made, error = site(path, sources, weights, method, rank, density, seed)
        A, B = refuse_infinite(path, made)
        tensors |= {f"{path}.adapter.A": A, f"{path}.adapter.B": B}
        rows.append(row_of(path, sources, len(A)))
        sites.append(CombinedSite(path, len(A), error))
    settings = {"method": method, "rank": rank, "density": density, "seed": seed}
    of = [{"folder": str(one.folder), "weight": w} for one, w in zip(sources, weights, strict=True)]
    base = next(({"base": one.base} for one in sources if one.base), {})
    write(target, replace(sources[0].plan, rows=tuple(rows)), tensors, {**base, "combined": settings | {"of": of}})
    return Combined(target, method, len(sources), tuple(sites))


def check(folders: Sequence[object], weights: Sequence[float], method: str, rank: int | None, density: float) -> None:
    if not folders or len(folders) != len(weights):
        raise ConfigError(f"combine: {len(folders)} adapters and {len(weights)} weights; one weight for each.")
    for weight in weights:
        if not math.isfinite(weight):
            raise ConfigError(f"combine: weight: {weight} is not allowed; a finite number.")
    if method not in METHODS:
        raise ConfigError(
            f"combine: method: {method} is not allowed; one of {', '.join(METHODS)}.{did_you_mean(method, METHODS)}"
        )
    if not 0 < density <= 1:
        raise ConfigError(f"combine: density: {density} is not allowed; a number above 0, up to 1.")
    if rank is not None:
        try:
            positive_integer("rank", rank)
        except ValueError as error:
            raise ConfigError(f"combine: {error}") from error


def source(folder: Path) -> Source:
    about = read_about(folder)
    plan = read_plan(folder / PLAN, about)
    for row in plan.rows:
        if row.adapter != dotted(LoRA):
            raise RefusedError(
                f"combine: {folder}: {row.path} carries {row.method}; only LoRA adapters can be combined."
            )
    try:
        wanted = {f"{row.path}.adapter.{n}": t for row in plan.rows for n, t in tensors_of(row).items()}
        plan, tensors = on_original_base(plan, read_tensors(folder, about, wanted))
    except (RefusedError, ValueError, TypeError, RuntimeError) as error:
        raise RefusedError(f"combine: {folder}: {error}") from error
    for row in plan.rows:
        refuse_damaged(folder, row, tensors)
    return Source(folder, plan, {row.path: row for row in plan.rows}, tensors, about.get("base"))


def tensors_of(row: Row) -> dict[str, Tensor]:
    """What its LoRA holds, without values."""
    return dict(on_paper(row, row.options).state_dict())


def refuse_damaged(folder: Path, row: Row, tensors: Mapping[str, Tensor]) -> None:
    for name in ("A", "B"):
        if not tensors[f"{row.path}.adapter.{name}"].isfinite().all():
            raise RefusedError(f"combine: {folder}: {row.path}.adapter.{name} holds values that are not finite.")


def refuse_unlike(sources: Sequence[Source]) -> None:
    first = sources[0]
    for other in sources[1:]:
        if first.base and other.base and first.base != other.base:
            raise RefusedError(f"combine: {first.folder} and {other.folder} were trained on different bases.")
    shapes: dict[str, tuple[tuple[int, ...], Path]] = {}
    for one in sources:
        for path, row in one.rows.items():
            shape, folder = shapes.setdefault(path, (row.shape, one.folder))
            if row.shape != shape:
                raise RefusedError(
                    f"combine: {path} is {'×'.join(map(str, shape))} in {folder} and "
                    f"{'×'.join(map(str, row.shape))} in {one.folder}: not adapters of one base."
                )
    for other in sources[1:]:
        sizes = [one.plan.total_parameters for one in (first, other)]
        if sizes[0] != sizes[1]:
            raise RefusedError(
                f"combine: the base of {first.folder} has {sizes[0]:,} parameters and that of {other.folder} "
                f"{sizes[1]:,}: not adapters of one base."
            )


def refuse_large(sources: Sequence[Source]) -> None:
    """Raises RefusedError where ΔW of a site, which ties and dare build in fp64, is beyond what a layer has."""
    for one in sources:
        for row in one.plan.rows:
            if math.prod(row.shape) > LARGEST:
                raise RefusedError(
                    f"combine: {one.folder}: {row.path} is of {'×'.join(map(str, row.shape))}; ties and dare build "
                    f"matrices of up to {LARGEST:,} values."
                )


def site(
    path: str,
    sources: Sequence[Source],
    weights: Sequence[float],
    method: str,
    rank: int | None,
    density: float,
    seed: int,
) -> tuple[Factors, float]:
    """The combination's factors at a site, in fp32, and how far B A is from what was asked for."""
    here = [
        (i, w, one.factors(path)) for i, (w, one) in enumerate(zip(weights, sources, strict=True)) if path in one.rows
    ]
    total, parts = sum(len(A) for _, _, (A, _) in here), sum(abs(w) * norm(*factors) for _, w, factors in here)
    if method == "sum":
        A = torch.cat([A for _, _, (A, _) in here])  # (Σr, in)
        B = torch.cat([w * B for _, w, (_, B) in here], dim=1)  # (out, Σr)
        stored = stored_as(A, B) if rank is None or rank >= total else stored_as(*cut(A, B, rank))
        return stored, relative(norm(*difference(stored, (A, B))), norm(A, B), parts)
    changes = [B @ A for _, _, (A, B) in here]  # (out, in) each
    factors = [w for _, w, _ in here]
    if method == "ties":
        wanted = ties(changes, factors, density)
    else:
        wanted = dare(changes, factors, density, [key(seed, "dare", i, path) for i, _, _ in here])
    stored = stored_as(*truncated(wanted, min(rank or total, *wanted.shape)))
    missed = float((stored[1].double() @ stored[0].double() - wanted).norm())
    return stored, relative(missed, float(wanted.norm()), parts)


def stored_as(A: Tensor, B: Tensor) -> Factors:
    return A.float().contiguous(), B.float().contiguous()


def refuse_infinite(path: str, factors: Factors) -> Factors:
    if not all(factor.isfinite().all() for factor in factors):
        raise ConfigError(f"combine: {path}: the combination is beyond fp32. Smaller weights?")
    return factors


def row_of(path: str, sources: Sequence[Source], rank: int) -> Row:
    """The site's row with the new rank and a scale of 1."""
    row = next(one.rows[path] for one in sources if path in one.rows)
    out, into = row.shape
    return replace(row, options=of_rank({}, 1.0, rank), parameters=rank * (out + into))
