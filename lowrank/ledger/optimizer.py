"""What an optimizer keeps: its state, and the memory that gradients lie in from step to step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank import classes
from lowrank.assemble import optimizer
from lowrank.schema import Config
from lowrank.train import flat

SCALED = 256  # elements to a scale of bitsandbytes' 8-bit state
SMALLEST = 4096  # elements from which on it is 8-bit, unless min_8bit_size says otherwise


def state_bytes(config: Config, trained: Sequence[Tensor], mode: FakeTensorMode) -> int:
    """Of all of ``trained``: found out by a step, without values, of one parameter of every size."""
    cls = classes.resolve(config.optim.target, torch.optim.Optimizer, "optim._target_")
    sizes = Counter((tuple(p.shape), p.dtype, p.device) for p in trained)
    if any(base.__module__.startswith("bitsandbytes.") for base in cls.__mro__):
        return sum(count * of_bitsandbytes(cls, config, shape) for (shape, *_), count in sizes.items())
    with mode:
        made = {size: nn.Parameter(torch.empty(size[0], dtype=size[1], device=size[2])) for size in sizes}
        one: Any = cls(list(made.values()), lr=config.optim.lr, **config.optim.options)
        for parameter in made.values():
            parameter.grad = torch.empty_like(parameter)
        one.step()
    return sum(count * held(one.state[made[size]]) for size, count in sizes.items())


def held(state: dict[str, Any]) -> int:
    return sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, Tensor))


def of_bitsandbytes(cls: type, config: Config, shape: tuple[int, ...]) -> int:
    """Two moments of Adam and its kin, one of momentum; 8-bit with an fp32 scale a block where the tensor is large."""
    size = torch.Size(shape).numel()
    moments = 2 if any(name in cls.__name__ for name in ("Adam", "LAMB", "AdEMAMix")) else 1
    if "8bit" not in cls.__name__ or size < int(config.optim.options.get("min_8bit_size", SMALLEST)):
        return moments * 4 * size
    return moments * (size + 4 * -(-size // SCALED))


def gradients_kept(config: Config, model: nn.Module) -> int:
    """Bytes of gradients that are there whether or not a parameter has one: those of one flat memory."""
    made = optimizer(replace(config.optim, groups=[]), model, fast=config.loop.fast)
    if config.optim.in_backward or not config.loop.fast or flat.why_not(made) is not None:
        return 0
    return sum(-(-p.numel() * p.element_size() // flat.ALIGN) * flat.ALIGN for p in of(model))


def of(model: nn.Module) -> list[nn.Parameter]:
    """What trains, each once."""
    return list({id(p): p for p in model.parameters() if p.requires_grad}.values())
