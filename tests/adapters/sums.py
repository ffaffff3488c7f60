"""Adapters to combine, as folders, and what they make of each weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from banks import trained
from safetensors.torch import load_file
from torch import Tensor, nn

from lowrank.adapters import LoRA
from lowrank.adapters.base import dense_weight
from lowrank.adapters.plan import Rules
from lowrank.adapters.sites import adapted
from lowrank.adapters.store import load_adapter, save_adapter

Make = Callable[..., Any]
# Of other ranks, scales and sites: some sites are of one alone.
KINDS: dict[str, Rules] = {
    "one": {"all-linear": partial(LoRA, r=2, alpha=3.0), "embedding": partial(LoRA, r=3)},
    "two": {"all-linear@0": partial(LoRA, r=4, alpha=5.0, rslora=True)},
    "three": {"all-linear": partial(LoRA, r=1), "lm_head": partial(LoRA, r=2)},
}


def saved(make: Make, where: Path, rules: Rules, name: str, **about: Any) -> Path:
    return save_adapter(trained(make(), rules, name), where / name, **about)


def changes(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter makes of each weight, less the weight: ΔW (out, in) in fp64, by the adapter's own ``merged``."""
    found = {}
    for path, site in adapted(model):
        weight = torch.zeros_like(dense_weight(site.base), dtype=torch.float64)
        found[path] = site.adapter.merged(weight, None)[0].detach()
    return found


def of(make: Make, folder: Path) -> dict[str, Tensor]:
    return changes(load_adapter(make(), folder))


def weighted(make: Make, folders: list[Path], weights: list[float]) -> dict[str, Tensor]:
    """Σ wᵢ ΔWᵢ, plainly."""
    total: dict[str, Tensor] = {}
    for folder, w in zip(folders, weights, strict=True):
        for path, change in of(make, folder).items():
            total[path] = total.get(path, torch.zeros_like(change)) + w * change
    return total


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def same_files(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "adapter.safetensors") for folder in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)
