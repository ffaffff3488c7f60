"""Optimizer groups by ordered rules over parameter names, and the optimizer's state by those names."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import ConfigError, nearest

GIVEN = ("params", "names", "lr", "peak_lr", "weight_decay")  # of a group: the configuration's and the schedule's
GROUP = "group:"
CPU = torch.device("cpu")
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # of which torch has a kernel of all that a step does
WAYS = ("foreach", "fused", "capturable", "differentiable")  # options by which a user chooses one


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


def fused(cls: type, given: Mapping[str, Any], parameters: Collection[Tensor]) -> dict[str, Any]:
    """The option by which a class of torch's computes a step in one kernel, where it has one for these parameters and
    ``given``, the user's options, choose no other way."""
    there = cls in FUSED and not any(name in given for name in WAYS)
    fits = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return {"fused": True} if there and fits else {}


def refuse_paged(cls: type, device: torch.device) -> None:
    """Raises ConfigError where a paged optimizer has nothing to page: bitsandbytes would leave it out by itself."""
    if "Paged" in cls.__name__ and cls.__module__.startswith("bitsandbytes.") and device.type != "cuda":
        raise ConfigError(
            f"optim._target_: {cls.__name__} keeps its state in the host's memory while a GPU does not need it, and "
            f"this run is on {device.type}. Choose optim=adamw8bit or optim=adamw, or loop.device=cuda."
        )


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Every group at ``factor`` of its peak; returns the first group's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def state_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as (tensors, plain values), both by ``parameter name|state name``; what it moves in a group
    by ``first parameter's name|group:name``. Raises ConfigError for a state that neither of the two can be."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for key, value in held(optimizer):
        if isinstance(value, Tensor):
            tensors[key] = value
        elif plain(value):
            values[key] = value
        else:
            raise ConfigError(
                f"optim._target_: {type(optimizer).__name__} holds {key} as {type(value).__name__}, which a checkpoint "
                "cannot keep: tensors, numbers and texts. Name another optimizer, or set checkpoint.every=0."
            )
    return tensors, values


def held(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    for group in optimizer.param_groups:
        for what, value in moved(group, optimizer.defaults).items():
            yield f"{group['names'][0]}|{GROUP}{what}", value
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for what, value in optimizer.state.get(parameter, {}).items():
                yield f"{name}|{what}", value


def moved(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer itself has set in a group (Prodigy its ``d``): no longer the default, or a tensor."""
    found = {what: value for what, value in group.items() if what not in GIVEN}
    return {w: v for w, v in found.items() if isinstance(v, Tensor) or w not in defaults or v != defaults[w]}


def plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def load_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Puts back what ``state_tensors`` gave; tensors keep their dtype and go to their parameter's device."""
    owners = {
        name: (group, parameter)
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    make_own_state(optimizer, {name.rpartition("|")[0] for name in [*tensors, *values] if f"|{GROUP}" not in name})
    for key, value in [*tensors.items(), *values.items()]:
        name, _, what = key.rpartition("|")
        group, parameter = owners[name]
        if what.startswith(GROUP):
            what, target, device = what.removeprefix(GROUP), group, value.device if isinstance(value, Tensor) else None
        else:
            target = optimizer.state[parameter]
            device = parameter.device if what != "step" or group.get("capturable") or group.get("fused") else CPU
        put(target, what, value, device)


def put(target: dict[str, Any], what: str, value: Any, device: torch.device | None) -> None:
    """In the memory that is there, where there is a tensor like it: that may be of a kind of its own (paged). Not a
    single number: several parameters may have one together, and must no longer where theirs differ."""
    there = target.get(what)
    if not isinstance(value, Tensor):
        target[what] = tuple(value) if isinstance(there, tuple) else value
    elif isinstance(there, Tensor) and there.ndim and (there.shape, there.dtype) == (value.shape, value.dtype):
        with torch.no_grad():
            there.copy_(value)
    else:
        target[what] = value.to(device, copy=True)


def make_own_state(optimizer: torch.optim.Optimizer, names: Collection[str]) -> None:
    """bitsandbytes makes a parameter's state at its first step, 8-bit or not by its size, and paged where it was asked
    to be: so it is asked to make it, and only the values are ours."""
    if not any(cls.__module__.startswith("bitsandbytes.") for cls in type(optimizer).__mro__):
        return
    maker: Any = optimizer
    for index, group in enumerate(optimizer.param_groups):
        for place, (name, parameter) in enumerate(zip(group["names"], group["params"], strict=True)):
            if name in names and not optimizer.state[parameter]:
                maker.init_state(group, parameter, index, place)
