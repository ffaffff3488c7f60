"""Optimizer groups by ordered rules over parameter names, and the optimizer's state by those names."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import ConfigError, nearest


def groups(
    parameters: Mapping[str, nn.Parameter], rules: Sequence[Mapping[str, Any]], *, lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer: the first rule whose ``match`` glob fits a name decides for it.

    ``[{match: "*.B", lr_ratio: 16}]``, 16 times ``lr`` for B, is LoRA+ (arXiv 2402.12354). What a rule leaves out,
    and names that no rule fits, take ``lr`` and ``weight_decay``. Weight decay is 0 for vectors and scalars (norms,
    biases, scales) unless a rule sets it. Each group carries ``peak_lr`` and the ``names`` of its parameters. Raises
    ConfigError where a rule decides for no parameter.
    """
    made: dict[tuple[float, float], dict[str, Any]] = {}
    used: set[int] = set()
    for name, parameter in parameters.items():
        index = next((i for i, rule in enumerate(rules) if fnmatch.fnmatchcase(name, rule["match"])), None)
        rule = {} if index is None else rules[index]
        used |= set() if index is None else {index}
        decay = rule.get("weight_decay", weight_decay if parameter.ndim > 1 else 0.0)
        rate = rule.get("lr", lr * rule.get("lr_ratio", 1))
        group = made.setdefault(
            (rate, decay), {"params": [], "names": [], "lr": rate, "peak_lr": rate, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    for index, rule in enumerate(rules):
        if index not in used:
            leaves = {f"*.{name.rpartition('.')[2]}" for name in parameters}
            close = nearest(rule["match"], leaves)
            hint = f" Nearest: '{close}'." if close else ""
            raise ConfigError(f"optim.groups: '{rule['match']}' matches no parameter that an earlier rule left.{hint}")
    return list(made.values())


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Every group at ``factor`` of its peak; returns the first group's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def state_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as (tensors, plain values), both by ``parameter name|state name``."""
    tensors, values = {}, {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for what, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}|{what}"] = value
                else:
                    values[f"{name}|{what}"] = value
    return tensors, values


def load_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Puts back what ``state_tensors`` gave; tensors keep their dtype and go to their parameter's device."""
    owner = {
        name: p for group in optimizer.param_groups for name, p in zip(group["names"], group["params"], strict=True)
    }
    for key, value in [*tensors.items(), *values.items()]:
        name, _, what = key.rpartition("|")
        parameter = owner[name]
        if isinstance(value, Tensor):
            value = value.clone() if what == "step" else value.to(parameter.device).clone()
        optimizer.state[parameter][what] = value
