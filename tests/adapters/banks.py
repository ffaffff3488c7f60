"""Models with adapters of different kinds, ranks and sites, each in a folder and each alone on a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters import IA3, OFT, DoRA, LoRA
from lowrank.adapters.inject import apply, named_trainable
from lowrank.adapters.plan import Rules, plan
from lowrank.adapters.store import load_adapter, save_adapter
from lowrank.keys import key

# Of GPT-2 and Llama alike: some sites of one alone, some of all; an OFT asks the base of changed inputs.
RULES: dict[str, Rules] = {
    "a": {"all-linear": partial(LoRA, r=2, alpha=3.0), "lm_head": partial(LoRA, r=1)},
    "b": {"all-linear@0": partial(DoRA, r=3), "embedding": partial(LoRA, r=4)},
    "c": {"all-linear": OFT},
    "d": {"all-linear@1": IA3},
}
NAMES = ["a", None, "b", "a", "c", "d"]  # of six rows: two of one adapter apart, one without


def trained(model: nn.Module, rules: Rules, what: object = 0) -> nn.Module:
    """With values that do something, keyed by ``what``."""
    apply(model, plan(model, rules))
    for name, parameter in named_trainable(model).items():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=key(1, what, name))
    return model


def alone(make: Callable[..., Any], name: str | None) -> nn.Module:
    """The model with one adapter of ``RULES``, or none."""
    return make() if name is None else trained(make(), RULES[name], name)


def folder(make: Callable[..., Any], name: str, where: Path) -> Path:
    return save_adapter(alone(make, name), where / name)


def together(make: Callable[..., Any], where: Path, names: str = "abcd") -> nn.Module:
    """One model with the named adapters of ``RULES``."""
    model: nn.Module = make()
    for name in names:
        load_adapter(model, folder(make, name, where), name=name)
    return model


def logits(model: nn.Module, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **more).logits
    return found


def tokens_of(*size: int) -> Tensor:
    return torch.randint(0, 64, size, generator=torch.Generator().manual_seed(3))


def furthest(one: Tensor, other: Tensor) -> float:
    """max |Δ| / max |·|"""
    return float((one - other).detach().abs().max() / other.detach().abs().max())
